"""Nobody: what is finished or failed is told, and nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.work import NOT_RUN, Outcome, finished, why_it_failed


def run(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """See `Executor`."""
    del resources
    for cell in cells:
        result = finished(cell)
        failure = "" if result else why_it_failed(cell) or NOT_RUN
        yield Outcome(cell=cell, result=result, failure=failure, ran=False)
