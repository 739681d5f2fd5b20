"""What every benchmark shares: real batches, contestants by turns, a table and JSON.

Only ratios within one run mean anything: machines differ, and this one differs from minute to
minute. So contestants take turns, every repeat is kept, and a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loralloc.runs.machine import WAIT_POLICY, let_idle_threads_sleep

let_idle_threads_sleep()  # PyTorch reads it once, when it is loaded

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import loralloc  # noqa: E402

FOLDERS = {"sst2": "sst2", "e2e": "e2e_nlg"}
PACKAGES = ("torch", "transformers", "peft", "trl")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    from loralloc.runs.quiet import prepare_process

    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("LORALLOC_DATA"),
        help="folder with sst2/ and e2e_nlg/ (LORALLOC_DATA); without it the embedded demo set",
    )
    made.add_argument("--quick", action="store_true", help="under 3 minutes on two cores")
    made.add_argument("--json", type=Path, help="where to write the results")
    prepare_process()
    return made


def data_sets(folder: Path | None) -> dict[str, str]:
    """Task -> data of SST-2 and E2E, or of the demo where the folder does not hold both."""
    found = {task: folder / name for task, name in FOLDERS.items()} if folder else {}
    if found and all(path.is_dir() for path in found.values()):
        return {task: str(path) for task, path in found.items()}
    return {"demo": "demo"}


def first_task(sets: Mapping[str, str]) -> tuple[str, str]:
    """E2E where it is at hand, else the demo."""
    task = "e2e" if "e2e" in sets else next(iter(sets))
    return task, sets[task]


def prepare(task: str, data: str, **options: Any) -> loralloc.Run:
    """A run of `smollm2-135m` as `loralloc train` makes it, ready to be trained."""
    with tempfile.TemporaryDirectory() as folder:
        named = {"task": task, "dataset_name": data, "model_name_or_path": "smollm2-135m"}
        return loralloc.prepare({**named, "output_dir": folder, **options})


def by_turns(
    contestants: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every repeat of every contestant, one after the other in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warmup, repeats):
        for name, contestant in contestants.items():
            _, taken = timed(contestant)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds it took."""
    _synchronize()
    begin = time.perf_counter()
    result = function()
    _synchronize()
    return result, time.perf_counter() - begin


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median, over the turns that both took, of one contestant's seconds over another's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # above the cores, others were computing too
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ[WAIT_POLICY],
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
    }


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Bytes that a function held on the GPU beyond what was there; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where benchmarks compute."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, numbers to four digits."""
    from rich.console import Console  # not on every machine with a GPU
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    Console().print(table)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the JSON of a benchmark, where one was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
