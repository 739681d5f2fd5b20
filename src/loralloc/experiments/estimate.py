"""How long a grid will take, before it begins: from its products, and from what has been run.

A training step of frozen weights costs their forward pass and the backward pass to the input, 4 N
operations a token for N parameters; reading costs 2 N. The machine's speed is measured for a
moment, of which runs reach a share. Where cells of a grid are finished, what they took corrects
the estimate.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.grid import Grid
from loralloc.experiments.work import finished
from loralloc.runs import protocol
from loralloc.tasks.catalog import get_task, split_sizes

SHARE = 0.4
"""Of the speed of a large product that a training step reaches, about."""

FIXED_S = 2.0
"""Loading, saving and measuring of a cell, about."""

CHARACTERS_A_TOKEN = 4
UNSEEN_TOKENS = 128
"""Of an example whose rows are not on this machine."""

NEW_TOKENS = {True: 4, False: 64}
"""Of an answer: whether it is a label."""

PASSES = {"alora-dnas": 2.0}
"""Methods that take more than one pass of training a step; the rounds of the others are few."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of a task's rows."""

    num_train: int
    num_test: int
    tokens: float
    """Of a row, about."""


class Estimator:
    """Estimates the seconds of cells of one grid."""

    def __init__(self, grid: Grid, *, operations_per_s: float | None = None) -> None:
        """Look at the rows, and at the machine.

        Args:
            grid: Whose cells.
            operations_per_s: Of a large product; None to measure it.
        """
        self._grid = grid
        self._speed = SHARE * (operations_per_s or measured_speed())
        self._rows = {task: rows_of(task, source) for task, source in grid.sources.items()}
        self._factor = 1.0

    def correct(self, cells: Sequence[Cell]) -> int:
        """Learn from the cells that are finished; their number."""
        ratios = []
        for cell in cells:
            result = finished(cell)
            if result is not None and result["seconds"] is not None:
                took = result["seconds"] + (result["test"] or {}).get("seconds", 0.0)
                ratios.append((took + FIXED_S) / self._guess(cell))
        self._factor = statistics.median(ratios) if ratios else 1.0
        return len(ratios)

    def seconds(self, cell: Cell) -> float:
        """Of a cell, at most: a run may stop early."""
        return self._factor * self._guess(cell)

    def _guess(self, cell: Cell) -> float:
        rows = self._rows[cell.task]
        batch, steps = planned_steps(cell.options, rows.num_train)
        one = self._grid.num_parameters * rows.tokens
        training = 4 * one * batch * steps * PASSES.get(cell.options["method"], 1.0)
        testing = 0.0
        if cell.test is not None:
            task = get_task(cell.task)
            is_label = bool(task.labels)
            new = cell.test.get("max_new_tokens", NEW_TOKENS[is_label])
            beams = 0 if self._grid.is_encoder else cell.test.get("num_beams", 5)
            written = self._grid.num_parameters * new * beams
            number = min(rows.num_test, cell.test.get("limit") or rows.num_test)
            testing = 2 * number * (one + written)
        return FIXED_S + (training + testing) / self._speed


def planned_steps(options: Any, num_train: int) -> tuple[int, int]:
    """Examples of a step, and steps at most, by the options of a run."""
    if options.get("protocol"):
        many = num_train >= protocol.MANY_EXAMPLES
        batch = protocol.LARGE_BATCH if many else protocol.SMALL_BATCH
        return batch, math.ceil(num_train / batch) * int(protocol.RECIPE["num_train_epochs"])
    batch = options.get("per_device_train_batch_size", 16)
    batch *= options.get("gradient_accumulation_steps", 1)
    epochs = options.get("num_train_epochs", 3)
    return batch, options.get("max_steps") or math.ceil(num_train / batch * epochs)


def rows_of(name: str, source: str | None) -> Rows:
    """Numbers of rows, from their files where they are here."""
    task = get_task(name)
    sizes = split_sizes(task)
    train = Path(source) / "train.jsonl" if source else None
    if train is None or not train.is_file():
        return Rows(num_train=sizes["train"], num_test=sizes.get("test", 0), tokens=UNSEEN_TOKENS)
    lines = train.read_text(encoding="utf-8").split("\n")[:-1]
    test = train.with_name("test.jsonl")
    num_test = test.read_text(encoding="utf-8").count("\n") if test.is_file() else 0
    return Rows(
        num_train=len(lines),
        num_test=num_test,
        tokens=statistics.fmean(map(len, lines)) / CHARACTERS_A_TOKEN,
    )


def measured_speed(size: int = 1024, repeats: int = 5) -> float:
    """Operations a second of a large product on this machine's accelerator, or its CPU."""
    import torch

    from loralloc.runs.machine import accelerator, fastest_dtype

    device = accelerator()
    a = torch.ones(size, size, device=device, dtype=fastest_dtype())
    (a @ a).sum().item()  # the first one is slower
    begin = time.perf_counter()
    for _ in range(repeats):
        b = a @ a
    b.sum().item()  # waits for all
    return 2 * size**3 * repeats / (time.perf_counter() - begin)
