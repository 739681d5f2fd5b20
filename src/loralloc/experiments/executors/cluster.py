"""A Ray cluster: processors and GPUs are Ray's resources, and a lost node costs its cells only.

The folder of cells has to be one that every node sees: a cell that was begun on a node that is lost
goes on elsewhere from its last checkpoint, and a finished one is not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.executors.worker import as_data, from_data
from loralloc.experiments.work import Outcome, attempt


def run(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """See `Executor`.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or none of its nodes
            has what a cell takes.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "The executor `ray` needs the package ray, which is not installed; install it with "
            "`pip install 'loralloc[ray]'`, or use the executor `pool`."
        ) from error
    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(address=resources.address, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise ValueError(
                f"There is no Ray cluster at {resources.address!r}; start one with `ray start "
                "--head`, or leave out `--address` for one on this machine."
            ) from error
    try:
        _check(ray, resources)
        yield from _outcomes(ray, cells, resources)
    finally:
        if begun:
            ray.shutdown()


def _outcomes(ray: Any, cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    options = {
        "num_cpus": resources.cpus_per_cell,
        "num_gpus": resources.gpus_per_cell,
        "max_retries": resources.retries,
    }
    shared = ray.remote(**options)(_carry_out)
    alone = ray.remote(**options, max_calls=1)(_carry_out)  # a process of its own
    running = {(alone if cell.alone else shared).remote(cell.as_data()): cell for cell in cells}
    while running:
        (ready, *_), _rest = ray.wait(list(running), num_returns=1)
        cell = running.pop(ready)
        try:
            yield from_data(cell, ray.get(ready))
        except ray.exceptions.RayError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Outcome(cell=cell, result=None, failure=f"Ray lost it: {reason}")


def _carry_out(data: dict[str, Any]) -> dict[str, Any]:
    from loralloc.runs.quiet import prepare_process

    prepare_process()
    return as_data(attempt(Cell.from_data(data)))


def _check(ray: Any, resources: Resources) -> None:
    """Refuse what no node could ever give: Ray would wait for it without end."""
    wanted = {"CPU": resources.cpus_per_cell, "GPU": resources.gpus_per_cell}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        raise ValueError(
            f"A cell is to take {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, and the "
            f"largest node has {most['CPU']:g} and {most['GPU']:g}; lower `--cpus_per_cell` or "
            "`--gpus_per_cell`."
        )
