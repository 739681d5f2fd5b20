"""From rows to what TRL's `SFTTrainer` reads: prompt and completion, messages or text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loralloc.tasks.alpaca import ALPACA_COLUMNS, alpaca_example
from loralloc.tasks.source import Split
from loralloc.tasks.task import Example, RowError, Task, text_field

if TYPE_CHECKING:
    from datasets import Dataset

READABLE_COLUMNS = (("prompt", "completion"), ("messages",), ALPACA_COLUMNS, ("text",))
"""The sets of columns that are understood without a task; the first that fits is taken."""

TRL_EXTRAS = ("tools", "chat_template_kwargs")
"""Further columns that TRL reads beside prompt and completion or messages."""


def to_sft(splits: Mapping[str, Split], task: Task | None = None) -> dict[str, Split]:
    """Keep of every split the columns that TRL reads, and nothing else.

    With a task, rows become prompt and completion. Without one the columns decide
    (`READABLE_COLUMNS`): prompt and completion, messages and text are passed on as they are,
    Alpaca's columns become prompt and completion (`alpaca.alpaca_example`).

    Raises:
        ValueError: If columns are missing or a row breaks the contract; one sentence that names
            the source, and the row (counted from 1) and its field.
    """
    return {name: replace(split, dataset=_sft_rows(split, task)) for name, split in splits.items()}


def to_examples(split: Split, task: Task) -> list[Example]:
    """Turn every row of a split into an example, for evaluation.

    Raises:
        ValueError: As `to_sft`.
    """
    _check_columns(split, task)
    return _examples(split, task.example)


def merge_references(examples: Iterable[Example]) -> list[Example]:
    """Make one example of all that share a prompt, with the references of all of them.

    The response stays that of the first, and the order is that of first appearance. This is how
    generation is measured: one prediction a prompt against every text written for it.
    """
    merged: dict[str, Example] = {}
    for example in examples:
        first = merged.setdefault(example.prompt, example)
        references = dict.fromkeys(first.references + example.references)
        merged[example.prompt] = replace(first, references=tuple(references))
    return list(merged.values())


def row_error(split: Split, number: int, error: RowError) -> ValueError:
    """Say where a row that breaks its contract is; `number` counts from 1."""
    return ValueError(f"Row {number} of {split.source}: {error}.")


def _sft_rows(split: Split, task: Task | None) -> Dataset:
    from datasets import Dataset

    if task is None:
        columns = _readable_columns(split)
        if columns != ALPACA_COLUMNS:
            return _passed_on(split, columns)
        examples = _examples(split, alpaca_example)
    else:
        examples = to_examples(split, task)
        if not all(example.response for example in examples):
            raise ValueError(f"The task {task.name} has no responses to train on, only prompts.")
    return Dataset.from_dict(
        {
            "prompt": [example.prompt for example in examples],
            "completion": [example.completion for example in examples],
        }
    )


def _examples(split: Split, example: Callable[[Mapping[str, object]], Example]) -> list[Example]:
    examples = []
    for number, row in enumerate(split.dataset, start=1):
        try:
            examples.append(example(row))
        except RowError as error:
            raise row_error(split, number, error) from error
    return examples


def _check_columns(split: Split, task: Task) -> None:
    found = split.dataset.column_names
    missing = [column for column in task.columns if column not in found]
    if missing:
        raise ValueError(
            f"The task {task.name} reads the columns {', '.join(task.columns)}; "
            f"{split.source} lacks {', '.join(missing)} and has {', '.join(found)}."
        )


def _readable_columns(split: Split) -> tuple[str, ...]:
    found = split.dataset.column_names
    for columns in READABLE_COLUMNS:
        if set(columns) <= set(found):
            return columns
    accepted = "; ".join(" + ".join(columns) for columns in READABLE_COLUMNS)
    raise ValueError(
        f"{split.source} has the columns {', '.join(found)}, and training reads one of: "
        f"{accepted} (or name the task whose columns these are)."
    )


def _passed_on(split: Split, columns: tuple[str, ...]) -> Dataset:
    """Check the rows that TRL is given as they are, and drop the columns it does not read."""
    for number, row in enumerate(split.dataset.select_columns(list(columns)), start=1):
        try:
            for column in columns:
                _check_value(row, column)
        except RowError as error:
            raise row_error(split, number, error) from error
    extras = () if columns == ("text",) else TRL_EXTRAS
    kept = [*columns, *(extra for extra in extras if extra in split.dataset.column_names)]
    return split.dataset.select_columns(kept)


def _check_value(row: Mapping[str, object], column: str) -> None:
    """Refuse what would fail deep inside the tokeniser: neither text nor messages."""
    value = row[column]
    if column == "prompt" and value == "":
        return  # an unconditional completion
    if isinstance(value, list) and value and column != "text":
        return
    if column == "messages":
        raise RowError(column, f"must be a list of messages and is {value!r:.60}")
    text_field(row, column)
