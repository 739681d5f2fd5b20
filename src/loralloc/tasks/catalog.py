"""The tasks by name, and their own data sets divided as in the paper.

The official test splits of GLUE and SuperGLUE have no labels, so the paper makes its own
(Liu et al. 2024, Appendix B). Rows are drawn with a fixed seed of their own, so every run and
every machine has the same splits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from loralloc.tasks.alpaca import ALPACA
from loralloc.tasks.boolq import BOOLQ
from loralloc.tasks.copa import COPA
from loralloc.tasks.demo import DEMO
from loralloc.tasks.e2e import E2E
from loralloc.tasks.mt_bench import MT_BENCH
from loralloc.tasks.qnli import QNLI
from loralloc.tasks.record import RECORD
from loralloc.tasks.rte import RTE
from loralloc.tasks.source import DEMO_NAME, Split, load_splits
from loralloc.tasks.squad import SQUAD
from loralloc.tasks.sst2 import SST2
from loralloc.tasks.task import Task

TASKS: dict[str, Task] = {
    "sst2": SST2,
    "rte": RTE,
    "qnli": QNLI,
    "boolq": BOOLQ,
    "copa": COPA,
    "record": RECORD,
    "squad": SQUAD,
    "e2e": E2E,
    "alpaca": ALPACA,
    "mt_bench": MT_BENCH,
    "demo": DEMO,
}


HELD_OUT_ROWS = 1000
"""Rows of train that become the development set under the rule "train_1000"."""

DRAW_SEED = 0


def get_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        ValueError: If there is none; the message suggests the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise ValueError(f"There is no task '{name}'{hint}; the tasks are {', '.join(TASKS)}.")


def load_task(
    task: Task,
    data: str | Path | None = None,
    *,
    config: str | None = None,
    split_names: Mapping[str, str] | None = None,
) -> dict[str, Split]:
    """Load a task's splits, in the order train, validation, test.

    Args:
        task: Whose rule divides its own Hub data set.
        data: As `load_splits` takes it. If None, the task's own data set on the Hub (the
            embedded rows, for the demo). Anything but the task's own Hub data set is used with
            the splits that it has.
        config: As `load_splits` takes it; the task's own Hub data set needs none.
        split_names: As `load_splits` takes it; splits asked for by name are not divided.

    Raises:
        ValueError: If the task has no data set of its own and none is given, or as
            `load_splits`; one sentence.
    """
    if data is None:
        data = DEMO_NAME if task.name == DEMO_NAME else task.hub_name
    if data is None:
        raise ValueError(
            f"The task {task.name} has no data set on the Hub; give a folder with its files "
            f"({', '.join(f'{name}.jsonl' for name in task.official_sizes)})."
        )
    is_own = str(data) == task.hub_name and not Path(data).exists()
    if is_own:
        config = config or task.hub_config
    if not is_own or split_names is not None or task.hub_rule == "official":
        return load_splits(data, config=config, split_names=split_names)
    labelled = {"train": "train", "validation": "validation"}
    return _divide(load_splits(data, config=config, split_names=labelled), task)


def split_sizes(task: Task) -> dict[str, int]:
    """Return the rows of each split of the task's own data set, once its rule is applied."""
    sizes = dict(task.official_sizes)
    if task.hub_rule == "train_1000":
        train, validation = sizes["train"] - HELD_OUT_ROWS, sizes["validation"]
        return {"train": train, "validation": HELD_OUT_ROWS, "test": validation}
    if task.hub_rule == "halve_validation":
        half = sizes["validation"] // 2
        return {**sizes, "validation": half, "test": sizes["validation"] - half}
    return sizes


def _divide(official: Mapping[str, Split], task: Task) -> dict[str, Split]:
    train, validation = official["train"], official["validation"]
    if task.hub_rule == "train_1000":
        held_out, rest = _draw(train, HELD_OUT_ROWS)
        return {
            "train": rest,
            "validation": replace(held_out, name="validation"),
            "test": replace(validation, name="test"),
        }
    half, rest = _draw(validation, len(validation.dataset) // 2)
    return {"train": train, "validation": half, "test": replace(rest, name="test")}


def _draw(split: Split, count: int) -> tuple[Split, Split]:
    """Draw rows at random; return them and the others, both in the order of the source."""
    rows = range(len(split.dataset))
    if count > len(rows):
        raise ValueError(
            f"{split.source} has {len(rows):,} rows, too few to draw {count:,} for another split."
        )
    drawn = set(Random(DRAW_SEED).sample(rows, count))

    def part(indices: list[int]) -> Split:
        source = f"{len(indices):,} rows drawn from {split.source}"
        return replace(split, dataset=split.dataset.select(indices), source=source)

    return part(sorted(drawn)), part([row for row in rows if row not in drawn])
