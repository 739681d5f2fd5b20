"""From rows to what TRL's `SFTTrainer` reads: prompt and completion, messages or text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loralloc.tasks.alpaca import ALPACA_COLUMNS, alpaca_example
from loralloc.tasks.conversations import (
    TEMPLATE_OPTIONS,
    TOOLS,
    Common,
    check_options,
    common,
    is_renamed,
    read_messages,
)
from loralloc.tasks.source import Split, where_rows_may_be
from loralloc.tasks.task import Example, RowError, Task, text_field

if TYPE_CHECKING:
    from datasets import Dataset

READABLE_COLUMNS = (
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ALPACA_COLUMNS,
    ("text",),
)
"""The sets of columns that are understood without a task; the first that fits is taken."""

TRL_EXTRAS = (TOOLS, TEMPLATE_OPTIONS)
"""Further columns that TRL reads beside prompt and completion or messages."""


def to_sft(splits: Mapping[str, Split], task: Task | None = None) -> dict[str, Split]:
    """Keep of every split the columns that TRL reads, and nothing else.

    With a task, rows become prompt and completion. Without one the columns decide
    (`READABLE_COLUMNS`): prompt and completion, messages and text are passed on as they are,
    conversations are messages by another name, messages with `from` and `value` get `role` and
    `content`, and Alpaca's columns become prompt and completion (`alpaca.alpaca_example`).

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


def conversation_column(rows: Dataset) -> str | None:
    """The column of conversations, or of their beginnings, in rows of `to_sft`; None of texts."""
    for column in ("messages", "prompt"):
        if column in rows.column_names and isinstance(rows[0][column], list):
            return column
    return None


def in_common(rows: Dataset) -> Common | None:
    """What the conversations among rows of `to_sft` have in common; None of other rows."""
    column = conversation_column(rows)
    return None if column is None else common(rows, column)


def _check_columns(split: Split, task: Task) -> None:
    found = split.dataset.column_names
    missing = [column for column in task.columns if column not in found]
    if missing:
        raise ValueError(
            f"The task {task.name} reads the columns {', '.join(task.columns)}; {split.source} "
            f"lacks {', '.join(missing)} and has {', '.join(found)}{_nested(split)}."
        )


def _readable_columns(split: Split) -> tuple[str, ...]:
    found = split.dataset.column_names
    for columns in READABLE_COLUMNS:
        if set(columns) <= set(found):
            return columns
    accepted = "; ".join(" + ".join(columns) for columns in READABLE_COLUMNS)
    raise ValueError(
        f"{split.source} has the columns {', '.join(found)}, and training reads one of: "
        f"{accepted} (or name the task whose columns these are){_nested(split)}."
    )


def _nested(split: Split) -> str:
    """Where the rows may be, of a source that is one row."""
    return where_rows_may_be(split.dataset[0]) if len(split.dataset) == 1 else ""


def _passed_on(split: Split, columns: tuple[str, ...]) -> Dataset:
    """Check the rows that TRL is given as they are, and drop the columns it does not read."""
    extras = () if columns == ("text",) else TRL_EXTRAS
    kept = [*columns, *(extra for extra in extras if extra in split.dataset.column_names)]
    rows = split.dataset.select_columns(kept)
    is_chat, has_other_keys = isinstance(rows[0][columns[0]], list), False
    for number, row in enumerate(rows, start=1):
        try:
            for column in columns:
                has_other_keys |= _check_value(row, column)
            _check_alike(row, columns, is_chat)
            check_options(row)
        except RowError as error:
            raise row_error(split, number, error) from error
    if has_other_keys:
        rows = _with_roles(rows, columns)
    if "conversations" in columns:
        rows = rows.rename_column("conversations", "messages")
    return rows


def _check_value(row: Mapping[str, Any], column: str) -> bool:
    """Refuse what would fail deep inside the tokeniser: neither text nor messages.

    Returns:
        Whether these are messages with `from` and `value`.
    """
    value = row[column]
    if column == "prompt" and value == "":
        return False  # an unconditional completion
    if isinstance(value, list) and value and column != "text":
        read_messages(value, column)
        return is_renamed(value)
    if column in ("messages", "conversations"):
        raise RowError(column, f"must be a list of messages and is {value!r:.60}")
    text_field(row, column)
    return False


def _check_alike(row: Mapping[str, Any], columns: tuple[str, ...], is_chat: bool) -> None:
    """Refuse texts among messages: TRL reads all rows as it reads the first."""
    for column in columns:
        if isinstance(row[column], list) != is_chat:
            kind, other = ("messages", "text") if is_chat else ("text", "messages")
            raise RowError(column, f"is {other}, and what comes before it is {kind}; use one form")


def _with_roles(rows: Dataset, columns: tuple[str, ...]) -> Dataset:
    """Messages with `role` and `content`, whatever their keys were."""
    from datasets import Dataset

    table = {name: rows[name][:] for name in rows.column_names}
    for name in columns:
        table[name] = [read_messages(value, name) for value in table[name]]
    return Dataset.from_dict(table, on_mixed_types="use_json")
