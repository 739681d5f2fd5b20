"""This process, cells of one backbone at once; one by one where a fleet cannot take them.

With several workers they test what is trained, which a fleet does not do at once.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.executors.pool import run as run_pool
from loralloc.experiments.executors.process import run as run_one_by_one
from loralloc.experiments.files import locked, write_json
from loralloc.experiments.work import (
    TRAINED,
    Begun,
    Outcome,
    attempt,
    begin_cell,
    failed,
    finished,
    free,
)
from loralloc.runs.fleet import FleetRuns, check_settings, group_of
from loralloc.runs.run import Run, train
from loralloc.runs.settings import resolve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that are trained at once, or one by one."""

    cells: tuple[Cell, ...]
    why_alone: str = ""
    """Why they are not trained at once; empty where they are."""


def groups(cells: Sequence[Cell], *, at_once: int) -> list[Group]:
    """What is trained at once, in the order of the first cell of each.

    Args:
        cells: Cells that are still to be trained.
        at_once: The most cells of a group.
    """
    alike: dict[str, list[Cell]] = {}
    alone: dict[str, list[Cell]] = {}
    for cell in cells:
        try:
            settings = resolve({**cell.options, "output_dir": str(cell.folder)})
            check_settings(settings)
        except (ValueError, TypeError) as error:
            alone.setdefault(str(error), []).append(cell)
            continue
        if cell.alone:
            why = "Its memory or its time is measured, which are its own only where it is alone."
            alone.setdefault(why, []).append(cell)
        else:
            alike.setdefault(group_of(settings), []).append(cell)
    found = [Group(cells=tuple(some), why_alone=why) for why, some in alone.items()]
    for some in alike.values():
        # Groups of like size: eighteen cells are two times nine, not sixteen and two.
        count = -(-len(some) // at_once)
        starts = [len(some) * number // count for number in range(count + 1)]
        found += [Group(cells=tuple(some[start:end])) for start, end in itertools.pairwise(starts)]
    return sorted(found, key=lambda group: cells.index(group.cells[0]))


def run(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """See `Executor`.

    A fleet that is killed goes on from the last checkpoint of each of its cells; a cell without one
    is begun again.
    """
    left, trained = [], []
    for cell in cells:
        if finished(cell) is not None:
            yield attempt(cell)
        elif (cell.folder / TRAINED).is_file():
            trained.append(cell)
        else:
            left.append(cell)
    waiting = deque(groups(left, at_once=resources.at_once))
    while waiting:
        group = waiting.popleft()
        if group.why_alone:
            logger.info("%d cells one by one: %s", len(group.cells), group.why_alone)
            yield from run_one_by_one(group.cells, resources)
            continue
        try:
            failures = _train_at_once(group.cells)
        except torch.OutOfMemoryError:
            if len(group.cells) == 1:
                raise
            half = len(group.cells) // 2
            logger.warning("%d cells do not fit into memory; %d at once.", len(group.cells), half)
            waiting.extendleft(
                Group(cells=part) for part in (group.cells[half:], group.cells[:half])
            )
            continue
        except TypeError as error:  # a backbone that cannot be shared, which its first step shows
            waiting.appendleft(Group(cells=group.cells, why_alone=str(error)))
            continue
        yield from failures.values()
        trained += [cell for cell in group.cells if cell.folder not in failures]
        yield from _finish(trained, resources)
        trained = []
    yield from _finish(trained, resources)


def _finish(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """What is left of cells that are trained, or that could only be trained alone."""
    test = run_pool if resources.workers > 1 else run_one_by_one
    yield from run_one_by_one([cell for cell in cells if cell.test is None], resources)
    yield from test([cell for cell in cells if cell.test is not None], resources)


def _train_at_once(cells: Sequence[Cell]) -> dict[Path, Outcome]:
    """Train cells together; those that could not be prepared are left to be trained alone.

    Returns:
        The outcome of each cell that failed while it trained, by its folder.
    """
    fleet, begun = FleetRuns(), list[Begun]()
    failures: dict[Path, Outcome] = {}
    try:
        with ExitStack() as locks:
            # In one order, or two fleets could wait for each other.
            for cell in sorted(cells, key=lambda cell: cell.folder):
                locks.enter_context(locked(cell.folder))
            for cell in cells:
                if finished(cell) is not None or (cell.folder / TRAINED).is_file():
                    continue  # by whoever held the lock
                try:
                    begun.append(begin_cell(cell, prepare=fleet.add))
                except ValueError as error:
                    logger.info("%s is trained alone: %s", cell.name, error)
            of_run = {id(one.run): one for one in begun}

            def carry_out(run: Run) -> dict[str, Any]:
                train(run)
                return of_run[id(run)].facts()

            for one, found in zip(begun, fleet.train(carry_out) if begun else (), strict=True):
                if isinstance(found, BaseException):
                    failures[one.cell.folder] = failed(one.cell, found)
                else:
                    # The seconds are those of all: whoever compares them has to know.
                    write_json(one.cell.folder / TRAINED, {**found, "at_once": len(begun)})
    finally:
        for one in begun:
            free(one.run)
    return failures
