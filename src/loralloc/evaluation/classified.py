"""Rows that nobody has labelled, with the labels that a run's classifier gives them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loralloc.evaluation.classifiers import label_logits
from loralloc.runs.folder import saved_labels
from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.trained import head_of, load_trained, saved_settings
from loralloc.tasks.catalog import get_task
from loralloc.tasks.classification import LABEL_COLUMN, TEXT_COLUMNS
from loralloc.tasks.columns import row_error
from loralloc.tasks.source import SUFFIXES, Split, read_table
from loralloc.tasks.task import Example, RowError, Task


@dataclass(frozen=True, kw_only=True)
class Classified:
    """A row with what a classifier says of it."""

    row: Mapping[str, Any]
    """As the file has it."""

    label: str
    """The most probable label."""

    probabilities: tuple[float, ...]
    """One for each label, in the order of the classifier's; their sum is 1."""


def classify(
    run: Path,
    data: Path,
    *,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[Classified], tuple[str, ...]]:
    """Give every row of a file the labels' probabilities under a run's classifier.

    The text is in the columns that the run was trained on; a column of labels is not needed.

    Args:
        run: A run folder whose adapter classifies.
        data: A CSV, JSON, JSON Lines or Parquet file.
        batch_size: Rows at once.
        trust_remote_code: Whether code that comes with the backbone may run.
        on_batch: Called with the number of rows done.

    Returns:
        The rows in their order, and the names of the labels.

    Raises:
        ValueError: The run is no classifier's, or the file has not its columns; one sentence.
    """
    head = head_of(run)
    if head is not CLASSIFICATION:
        raise ValueError(
            f"The run in {run} has the {head.name} head, which gives labels no probabilities; use "
            "`loralloc generate` for texts, or `loralloc eval` for a task."
        )
    if not data.is_file() or data.suffix.lower() not in SUFFIXES:
        what = f"{data} is of another kind" if data.is_file() else f"There is no file {data}"
        raise ValueError(f"{what}; give a CSV, JSON, JSON Lines or Parquet file.")
    rows = read_table(data)
    if not len(rows):
        raise ValueError(f"{data} has no rows, so there is nothing to predict.")
    saved, labels = saved_settings(run), tuple(saved_labels(run))
    _check_free(rows.column_names, labels)
    examples = _examples(Split(name="test", dataset=rows, source=str(data)), saved)
    model, tokenizer = load_trained(run, head=head, trust_remote_code=trust_remote_code)
    logits = label_logits(
        model,
        tokenizer,
        examples,
        max_length=saved.get("max_length"),
        batch_size=batch_size,
        on_batch=on_batch,
    )
    found = [
        Classified(row=row, label=labels[max(range(len(p)), key=p.__getitem__)], probabilities=p)
        for row, p in zip(rows, map(tuple, logits.softmax(dim=-1).tolist()), strict=True)
    ]
    return found, labels


def write_csv(file: TextIO, rows: Sequence[Classified], labels: Sequence[str]) -> None:
    """Write rows with the columns `predicted` and, for each label, `p(LABEL)` behind their own.

    Raises:
        ValueError: The rows have a column of such a name already.
    """
    added, own = _added(labels), list(rows[0].row)
    _check_free(own, labels)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*own, *added])
    for each in rows:
        shares = (f"{share:.6f}" for share in each.probabilities)
        writer.writerow([*(each.row[name] for name in own), each.label, *shares])


def _added(labels: Sequence[str]) -> list[str]:
    """The columns of what is predicted."""
    return ["predicted", *(f"p({label})" for label in labels)]


def _check_free(own: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse rows that have columns of these names.

    Raises:
        ValueError: Naming one.
    """
    if twice := [name for name in _added(labels) if name in own]:
        raise ValueError(f"The data has a column {twice[0]!r} already; rename it.")


def _examples(split: Split, saved: Mapping[str, Any]) -> list[Example]:
    """The texts, by the run's task or by its columns."""
    task = get_task(saved["task"]) if saved.get("task") else None
    found = split.dataset.column_names
    columns = _columns(task, saved, found)
    if missing := [name for name in columns if name not in found]:
        raise ValueError(
            f"{split.source} has the columns {', '.join(found)}, and the run reads "
            f"{', '.join(columns)}; it lacks {', '.join(missing)}."
        )
    return list(_read(split, task, columns))


def _read(split: Split, task: Task | None, columns: Sequence[str]) -> Iterator[Example]:
    for number, row in enumerate(split.dataset, start=1):
        try:
            if task:
                yield task.example({**row, LABEL_COLUMN: 0})  # nobody looks at it
                continue
            for name in columns:
                if not isinstance(row[name], str):
                    raise RowError(name, f"must be text and is {row[name]!r:.60}")
        except RowError as error:
            raise row_error(split, number, error) from error
        text, pair = row[columns[0]], row[columns[1]] if len(columns) > 1 else None
        yield Example(prompt=text, response="", text=text, text_pair=pair)


def _columns(task: Task | None, saved: Mapping[str, Any], found: Sequence[str]) -> list[str]:
    if task:
        return [name for name in task.columns if name != LABEL_COLUMN]
    first, *others = TEXT_COLUMNS
    field = saved.get("dataset_text_field") or first
    candidates = [saved["text_column"]] if saved.get("text_column") else [first, field, *others]
    first = next((name for name in candidates if name in found), candidates[0])
    return [first, *([pair] if (pair := saved.get("text_pair_column")) else [])]
