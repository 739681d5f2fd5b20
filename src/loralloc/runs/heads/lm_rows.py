"""What the rows of a language model and its options have to do with each other, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from loralloc.runs.data import ROW
from loralloc.tasks.columns import conversation_column
from loralloc.tasks.conversations import template_options
from loralloc.tasks.source import Split

TEMPLATES = (".jinja", ".j2")
"""Endings of files that hold a chat template."""


def check_options(
    splits: Mapping[str, Split], tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> None:
    """Refuse options that rows of this form do not read, and conversations without a template.

    Raises:
        ValueError: Naming the option.
    """
    train = splits["train"]
    is_chat = conversation_column(train.dataset) is not None
    path = args.chat_template_path
    if path is not None and not (path.endswith(TEMPLATES) and Path(path).is_file()):
        raise ValueError(
            f"`chat_template_path` is {path!r}, and must be a file with a template "
            f"({' or '.join(TEMPLATES)}): that of another tokenizer would come with new tokens, "
            "whose embeddings no adapter holds."
        )
    if path is not None and not is_chat:
        raise ValueError(
            f"`chat_template_path` is for conversations, and {train.source} holds texts; leave it "
            "out."
        )
    if is_chat and path is None and not tokenizer.chat_template:
        raise ValueError(
            f"{train.source} holds conversations, and the model's tokenizer has no chat template; "
            "give one with `--chat_template_path FILE.jinja`."
        )
    if args.completion_only_loss and "completion" not in train.dataset.column_names:
        other = "; for messages there is `assistant_only_loss`" if is_chat else ""
        raise ValueError(
            f"`completion_only_loss` is true, and {train.source} has no completions{other}; leave "
            "it out."
        )


@contextmanager
def refused_rows_named(
    splits: Mapping[str, Split], tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Name the row that the chat template raised at while rows were tokenised.

    Raises:
        ValueError: With the row and the template's words.
    """
    try:
        yield
    except Exception:  # a template may raise anything, and whatever is not its fault goes on
        for split in splits.values():
            _refuse_untemplated(split, tokenizer)
        raise


def _refuse_untemplated(split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    column = conversation_column(split.dataset)
    if column is None:
        return
    for row in sorted(split.dataset, key=lambda row: row[ROW]):
        completion = row.get("completion", []) if column == "prompt" else []
        try:
            _render(tokenizer, row, row[column], add_generation_prompt=column == "prompt")
            _render(tokenizer, row, row[column] + completion)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"Row {row[ROW]} of {split.source}: the model's chat template does not take the "
                f"conversation: {reason.rstrip('.')}."
            ) from error


def _render(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], messages: Any, **options: Any
) -> None:
    tokenizer.apply_chat_template(messages, tokenize=False, **template_options(row), **options)
