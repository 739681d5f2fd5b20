"""From rows to what a classifier reads: one text or two, and the number of the label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loralloc.tasks.columns import row_error, to_examples
from loralloc.tasks.source import Split
from loralloc.tasks.task import RowError, Task

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMN = "label"

_WHOLE_NUMBER = re.compile(r"-?\d+")


def to_classification(
    splits: Mapping[str, Split],
    task: Task | None = None,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Give every split the columns `text` (str) and `label` (int); return the label names too.

    Rows about two texts have a column `text_pair` (str) as well. With a task, the task decides.
    Without one the text is in `text_column` (otherwise the first of `TEXT_COLUMNS` that is
    there), the second text in `text_pair_column` (otherwise there is none) and the label in
    `label_column` (otherwise "label"). Label names come from the data set's schema where it has
    them, otherwise from the train split (or the first there is): its distinct labels, whole
    numbers or texts, in ascending order (of value where every text is a whole number, as in a
    CSV file). Where the `labels` of a classifier are given, rows get their numbers among these, and
    may have some of them only.

    Raises:
        ValueError: If columns are missing, the task has no labels, there are fewer than two, or
            a row has no text or a label that is not among them; one sentence.
    """
    if task is not None:
        if any(name is not None for name in (text_column, text_pair_column, label_column)):
            raise ValueError(
                f"The task {task.name} knows its columns: leave out text_column, text_pair_column "
                "and label_column."
            )
        if not task.labels:
            raise ValueError(f"The task {task.name} generates text and has no labels to predict.")
        rows = {name: _task_rows(split, task) for name, split in splits.items()}
        return rows, task.labels

    if labels is not None:
        named = {
            name: _known_rows(split, text_column, text_pair_column, label_column, labels)
            for name, split in splits.items()
        }
        return named, tuple(labels)

    first = splits.get("train") or next(iter(splits.values()))
    label = label_column or LABEL_COLUMN
    _text_columns(first, text_column, text_pair_column, label)
    values = _label_values(first, label)
    by_value = {value: index for index, value in enumerate(values)}
    names = _schema_names(first, label) or tuple(str(value) for value in values)
    rows = {}
    for name, split in splits.items():
        texts = _text_columns(split, text_column, text_pair_column, label)
        rows[name] = _column_rows(split, texts, label, by_value)
    return rows, names


def _known_rows(
    split: Split,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
    labels: Sequence[str],
) -> Split:
    """Rows with labels of a classifier that is there."""
    column = label_column or LABEL_COLUMN
    texts = _text_columns(split, text_column, text_pair_column, column)
    names = _schema_names(split, column)
    by_value: dict[int | str, int] = {}
    for number, name in enumerate(labels):
        if names is None:
            by_value |= {name: number} | ({int(name): number} if _is_whole_number(name) else {})
        elif name in names:
            by_value[names.index(name)] = number
    return _column_rows(split, texts, column, by_value)


def _is_whole_number(text: str) -> bool:
    return bool(_WHOLE_NUMBER.fullmatch(text))


def _task_rows(split: Split, task: Task) -> Split:
    examples = to_examples(split, task)
    columns: dict[str, list[object]] = {
        "text": [example.text for example in examples],
        "text_pair": [example.text_pair for example in examples],
        "label": [example.label for example in examples],
    }
    if not any(columns["text_pair"]):
        del columns["text_pair"]
    return _with_columns(split, columns)


def _column_rows(
    split: Split, texts: Sequence[str], label: str, by_value: Mapping[int | str, int]
) -> Split:
    columns: dict[str, list[object]] = {name: [] for name in ("text", "text_pair")[: len(texts)]}
    columns["label"] = []
    for number, row in enumerate(split.dataset.select_columns([*texts, label]), start=1):
        try:
            for text in texts:
                if not isinstance(row[text], str):
                    raise RowError(text, f"must be text and is {row[text]!r:.60}")
            if not isinstance(row[label], int | str) or row[label] not in by_value:
                known = ", ".join(repr(value) for value in by_value)
                raise RowError(label, f"must be one of {known:.200} and is {row[label]!r:.60}")
        except RowError as error:
            raise row_error(split, number, error) from error
        values = (*(row[text] for text in texts), by_value[row[label]])
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return _with_columns(split, columns)


def _with_columns(split: Split, columns: Mapping[str, Sequence[object]]) -> Split:
    from datasets import Dataset

    return replace(split, dataset=Dataset.from_dict(dict(columns)))


def _text_columns(
    split: Split, text_column: str | None, text_pair_column: str | None, label: str
) -> tuple[str, ...]:
    """Return the columns of the texts, once they and that of the label are known to be there."""
    found = split.dataset.column_names
    others = (text_pair_column,) if text_pair_column else ()
    candidates = (text_column,) if text_column else TEXT_COLUMNS
    for text in candidates:
        if {text, *others, label} <= set(found):
            return (text, *others)
    raise ValueError(
        f"{split.source} has the columns {', '.join(found)}, and classification reads "
        f"{' or '.join(candidates)} with {' and '.join([*others, label])}: name others with "
        "text_column, text_pair_column and label_column."
    )


def _label_values(split: Split, column: str) -> Sequence[int | str]:
    """List the distinct labels in ascending order; in a schema with names, all numbers of it."""
    names = _schema_names(split, column)
    if names is not None:
        return list(range(len(names)))
    numbers: set[int] = set()
    texts: set[str] = set()
    for number, value in enumerate(split.dataset[column], start=1):
        if isinstance(value, str) and value.strip():
            texts.add(value)
        elif isinstance(value, int):
            numbers.add(value)
        else:
            error = RowError(column, f"must be a whole number or a text and is {value!r:.60}")
            raise row_error(split, number, error)
    if numbers and texts:
        raise ValueError(
            f"{split.source}: the column '{column}' mixes numbers and texts; use one of them."
        )
    if len(numbers) + len(texts) < 2:
        raise ValueError(
            f"{split.source}: every row has the same {column}; a classifier needs at least two."
        )
    if all(_WHOLE_NUMBER.fullmatch(text) for text in texts):
        return sorted(numbers) or sorted(texts, key=int)
    return sorted(texts)


def _schema_names(split: Split, column: str) -> tuple[str, ...] | None:
    from datasets import ClassLabel

    feature = split.dataset.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None
