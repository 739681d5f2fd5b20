"""The rows that an experiment trains and tests on: whole data sets, or slices in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralloc.experiments.files import write_text
from loralloc.experiments.made_rows import made_rows
from loralloc.tasks.catalog import get_task, load_task
from loralloc.tasks.source import SUFFIXES
from loralloc.tasks.task import Task

QUESTIONS = "mt_bench"
"""The task whose questions a judge reviews the answers to."""


def source_of(task: Task, data: Path | None) -> str | None:
    """The folder of a task's rows below a folder of data sets; None where it has none.

    It may have the task's name or its Hub data set's, as in "e2e" or "e2e_nlg".
    """
    if data is None:
        return None
    hub = (task.hub_name or task.name).rpartition("/")[2].replace("-", "_")
    for name in dict.fromkeys((task.name, hub)):
        if (data / name).is_dir():
            return str((data / name).absolute())
    return None


def rows_of(
    name: str,
    *,
    data: Path | None,
    limits: Mapping[str, int] | None,
    folder: Path,
    made: bool = False,
    shortest: bool = False,
    tested: bool = True,
) -> str | None:
    """Where a task's rows are for the runs of an experiment.

    Args:
        name: The task's.
        data: A folder with a folder for each data set.
        limits: Rows of each split at most; None for all rows.
        folder: Where slices are written.
        made: Whether rows are made up where the data has none of this task.
        shortest: Whether the shortest rows are taken, not the first.
        tested: Whether there has to be a test split: where the data has none, the last rows of the
            training split are it.

    Returns:
        What a run takes as `dataset_name`; None for the task's own data set on the Hub.

    Raises:
        ValueError: The rows cannot be loaded.
    """
    task = get_task(name)
    source = source_of(task, data)
    if limits is None:
        return source
    wanted = {split: limits[split] for split in limits if split in _splits(task, tested=tested)}
    are_made = source is None and made
    kind = "made" if are_made else "shortest" if shortest else "first"
    parts = [name, kind, *map(str, wanted.values()), hash_of(source)[:8]]
    target = folder / "-".join(filter(None, parts))
    if all((target / f"{split}.jsonl").is_file() for split in wanted):
        return str(target.absolute())
    rows = made_rows(name, wanted) if are_made else _slices(task, source, wanted, shortest=shortest)
    for split, chosen in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen]
        write_text(target / f"{split}.jsonl", "".join(lines))
    return str(target.absolute())


def hash_of(source: str | None) -> str:
    """What tells these rows from others; empty for a data set on the Hub.

    Args:
        source: What a run takes as `dataset_name`: a folder, a file, or a name.
    """
    if source is None or not Path(source).exists():
        return ""
    place, digest = Path(source), hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _splits(task: Task, *, tested: bool) -> tuple[str, ...]:
    if task.name == QUESTIONS:
        return ("test",)
    return ("train", "validation", "test") if tested else ("train", "validation")


def _slices(
    task: Task, source: str | None, limits: Mapping[str, int], *, shortest: bool
) -> dict[str, list[Any]]:
    """The first or the shortest rows of every split, in their order."""
    splits = {name: split.dataset.to_list() for name, split in load_task(task, source).items()}
    if "test" in limits and "test" not in splits and len(splits.get("train", ())) > limits["test"]:
        splits["train"], splits["test"] = (
            splits["train"][: -limits["test"]],
            splits["train"][-limits["test"] :],
        )
    found = {}
    for split, limit in limits.items():
        if split not in splits:
            continue
        rows: list[Any] = splits[split]
        chosen = list(range(len(rows)))
        if shortest:
            chosen.sort(key=lambda i: len(json.dumps(rows[i], default=str)))
        found[split] = [rows[i] for i in sorted(chosen[:limit])]
    return found
