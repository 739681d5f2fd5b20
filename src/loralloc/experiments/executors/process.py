"""This process, one cell after another; a cell that needs a process of its own gets one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.executors.pool import run as run_in_pool
from loralloc.experiments.work import Outcome, attempt


def run(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """See `Executor`."""
    for cell in cells:
        if cell.alone:
            yield from run_in_pool([cell], replace(resources, workers=1))
        else:
            yield attempt(cell)
