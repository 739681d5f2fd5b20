"""What an executor is: cells in, outcomes out, in whatever order they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Protocol

from loralloc.experiments.cell import Cell
from loralloc.experiments.work import Outcome


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What an executor may use; each reads what concerns it."""

    workers: int = 1
    """Processes on this machine at once."""

    at_once: int = 16
    """Cells that are trained at once on one backbone, at most."""

    cpus_per_cell: float = 1.0
    """Processors that a cell takes of a cluster."""

    gpus_per_cell: float = 0.0
    """GPUs that a cell takes of a cluster; below 1 where several share one."""

    address: str | None = None
    """The cluster's; None for one on this machine alone."""

    retries: int = 3
    """How often a cell is begun again when the process or the node that runs it is lost."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"workers": 1, "at_once": 1, "cpus_per_cell": 0, "gpus_per_cell": 0, "retries": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; it must be at least {minimum}."
                )


class Executor(Protocol):
    """Carries out cells with `work.attempt`, wherever that is, and yields each outcome.

    A cell that is finished is not run again and a half-finished one goes on: both are in its
    folder, so that every executor grants them.
    """

    def __call__(self, cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
        """One outcome a cell, as they come."""


EXECUTORS = {
    "process": "process:run",
    "fleet": "fleet:run",
    "none": "nobody:run",
    "pool": "pool:run",
    "ray": "cluster:run",
}
"""Module and function of each, imported when they are asked for."""


def get_executor(name: str) -> Executor:
    """The executor of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in EXECUTORS:
        near = get_close_matches(name, EXECUTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(EXECUTORS)}."
        raise ValueError(f"There is no executor {name!r}; {hint}")
    module, _, function = EXECUTORS[name].partition(":")
    found: Executor = getattr(import_module(f"loralloc.experiments.executors.{module}"), function)
    return found
