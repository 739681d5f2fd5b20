"""Span prediction with an encoder: on which token an answer begins, and on which it ends.

The head is two linear layers, one that scores every token as the beginning and one that scores it
as the end. Transformers keeps both in `qa_outputs`, one `Linear(hidden, 2)`: a layer a row.

A context longer than the model reads is cut into windows that overlap by `stride` tokens:

    [CLS] question [SEP] tokens   0..300 [SEP]
    [CLS] question [SEP] tokens 200..500 [SEP]     stride 100

A window that holds no answer points at its first token, [CLS]. Answers are characters in the data
and characters again in a prediction; tokens know which characters they stand for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase, TrainingArguments

from loralloc.runs.data import ROW
from loralloc.runs.heads.classification import SafeTrainer, encoder_trainer
from loralloc.runs.heads.head import Head
from loralloc.runs.models import longest_input
from loralloc.tasks.catalog import TASKS
from loralloc.tasks.columns import to_examples
from loralloc.tasks.source import Split
from loralloc.tasks.task import Span, Task, has_spans

COLUMNS = ("question", "context", "answers", "starts")
NO_ANSWER = (0, 0)
"""First and last token of "no answer here": [CLS]."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A question with a stretch of its context, as the model reads them."""

    example: int
    """Index of the example whose window it is."""

    input_ids: list[int]
    """Its tokens."""

    offsets: tuple[tuple[int, int] | None, ...]
    """Of every token, the characters of the context it stands for; None outside the context."""

    begin: int
    """First character of the context that the window holds."""

    end: int
    """The character after the last one it holds."""


def windows(
    tokenizer: PreTrainedTokenizerBase,
    spans: Sequence[Span],
    *,
    max_length: int,
    stride: int | None = None,
) -> list[Window]:
    """Cut contexts into windows that the model can read, in their order.

    Args:
        tokenizer: A fast tokenizer, which knows the characters of its tokens.
        spans: Questions with their contexts.
        max_length: Most tokens of a window, the question and special tokens among them.
        stride: Tokens of the context that neighbouring windows share; a quarter of `max_length`
            by default.

    Raises:
        ValueError: The tokenizer is not fast, or a question leaves no room for its context.
    """
    if not spans:
        return []
    stride = max_length // 4 if stride is None else stride
    _check_room(tokenizer, spans, max_length, stride)
    encoded = tokenizer(
        [span.question for span in spans],
        [span.context for span in spans],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        # PEFT's model for question answering takes them and does not pass them on. Where they are
        # left out from the start, the adapter reads the same in PEFT and merged.
        return_token_type_ids=False,
    )
    owners = encoded["overflow_to_sample_mapping"]
    found = []
    for number, owner in enumerate(owners):
        context = spans[owner].context
        offsets = tuple(
            characters if sequence == 1 else None
            for characters, sequence in zip(
                encoded["offset_mapping"][number], encoded.sequence_ids(number), strict=True
            )
        )
        held = [characters for characters in offsets if characters is not None]
        is_first = number == 0 or owners[number - 1] != owner
        is_last = number == len(owners) - 1 or owners[number + 1] != owner
        found.append(
            Window(
                example=owner,
                input_ids=encoded["input_ids"][number],
                offsets=offsets,
                begin=0 if is_first else held[0][0],
                end=len(context) if is_last else _with_marks(context, held[-1][1]),
            )
        )
    return found


def tokens_of(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """First and last token that hold the characters `start` to `end` of the context.

    Returns:
        Positions in the window; None where it does not hold all of these characters.
    """
    if start < window.begin or end > window.end:
        return None
    inside = [
        position
        for position, characters in enumerate(window.offsets)
        if characters is not None and characters[0] < end and characters[1] > start
    ]
    return (inside[0], inside[-1]) if inside else None


def text_of(window: Window, context: str, first: int, last: int) -> str:
    """The characters of the context between two tokens of its window, those of both included."""
    begin, end = window.offsets[first], window.offsets[last]
    assert begin is not None and end is not None, "a token outside the context"
    return context[begin[0] : _with_marks(context, end[1])].strip()


def span_rows(splits: Mapping[str, Split], task: Task | None) -> dict[str, Split]:
    """Give every split the columns question, context, answers and starts, and nothing else.

    Raises:
        ValueError: A row breaks the task's contract, or its answer is not a stretch of a text.
    """
    from datasets import Dataset

    assert task is not None, "a run with a span head has a task"
    rows = {}
    for name, split in splits.items():
        spans = [example.span for example in to_examples(split, task)]
        if None in spans:
            raise ValueError(
                f"Row {spans.index(None) + 1} of {split.source} has no answer that is a stretch of "
                f"a text, which is what span prediction learns from; use the task {task.name} with "
                "a causal language model."
            )
        columns = {column: [getattr(span, column) for span in spans] for column in COLUMNS}
        rows[name] = replace(split, dataset=Dataset.from_dict(columns))
    return rows


def span_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    splits: Mapping[str, Split],
    *,
    max_length: int | None = None,
    stride: int | None = None,
) -> SafeTrainer:
    """A trainer for splits of `span_rows`, numbered; its examples are their windows.

    A window learns the first of its row's answers that it holds.

    Raises:
        ValueError: No window holds an answer of some row whole.
    """
    max_length = longest_input(model, tokenizer, max_length)
    tokenizer.padding_side = "right"  # positions are counted from the left
    data = {
        name: splits[name].dataset.map(
            lambda rows, split=splits[name]: _training_rows(
                split, rows, tokenizer, max_length, stride
            ),
            batched=True,
            batch_size=100,
            remove_columns=splits[name].dataset.column_names,
        )
        for name in ("train", "validation")
    }
    return encoder_trainer(model, tokenizer, args, data)


def _training_rows(
    split: Split,
    rows: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int | None,
) -> dict[str, list[Any]]:
    values = zip(*(rows[column] for column in COLUMNS), strict=True)
    spans = [
        Span(question=question, context=context, answers=tuple(answers), starts=tuple(starts))
        for question, context, answers, starts in values
    ]
    cut = windows(tokenizer, spans, max_length=max_length, stride=stride)
    targets = [answer_tokens(window, spans[window.example]) for window in cut]
    taught = {window.example for window, target in zip(cut, targets, strict=True) if target}
    lost = [index for index in range(len(spans)) if index not in taught]
    if lost:
        answer = spans[lost[0]].answers[0]
        raise ValueError(
            f"Row {rows[ROW][lost[0]]} of {split.source}: no window of {max_length} tokens holds "
            f"the whole answer {answer!r:.60}; raise `stride` or `max_length`, or leave the row "
            "out."
        )
    positions = [target or NO_ANSWER for target in targets]
    return {
        "input_ids": [window.input_ids for window in cut],
        "attention_mask": [[1] * len(window.input_ids) for window in cut],
        "start_positions": [first for first, _ in positions],
        "end_positions": [last for _, last in positions],
    }


def answer_tokens(window: Window, span: Span) -> tuple[int, int] | None:
    """First and last token of the first of a span's answers that a window holds; None if none."""
    for answer, start in zip(span.answers, span.starts, strict=True):
        tokens = tokens_of(window, start, start + len(answer))
        if tokens:
            return tokens
    return None


def _check_room(
    tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span], max_length: int, stride: int
) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not know the characters of its tokens, which answers "
            "are cut out by; use a model with a fast tokenizer (tokenizer.json)."
        )
    if stride < 0:
        raise ValueError(f"`stride` is {stride}; windows share 0 tokens or more.")
    questions = tokenizer(
        [span.question for span in spans], add_special_tokens=False, verbose=False
    )["input_ids"]
    taken = tokenizer.num_special_tokens_to_add(pair=True)
    for question, span in zip(questions, spans, strict=True):
        if max_length - taken - len(question) <= stride:
            raise ValueError(
                f"The question {span.question!r:.60} has {len(question)} tokens, which leaves a "
                f"window of {max_length} no room for more of its context than the {stride} tokens "
                "that windows share; raise `max_length`, lower `stride` or shorten the question."
            )


def _with_marks(text: str, end: int) -> int:
    """Step over combining marks: a tokenizer that strips accents has no token for them."""
    while end < len(text) and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def _check(model: str, task: Task | None, is_encoder: bool) -> None:
    if not is_encoder:
        raise ValueError(
            f"{model} reads in one direction only, and a span is found by reading in both; use an "
            "encoder such as minilm-l6, or `--head lm`."
        )
    if task is None or not has_spans(task):
        known = ", ".join(name for name, other in TASKS.items() if has_spans(other))
        given = "no task is named" if task is None else f"the task {task.name} has none"
        raise ValueError(
            f"A span head finds answers that are stretches of a text, and {given}; use one of the "
            f"tasks {known}."
        )


SPAN = Head(
    name="span",
    task_type=TaskType.QUESTION_ANS,
    auto_class="AutoModelForQuestionAnswering",
    measures={"loss": False},
    suits=lambda task, is_encoder: is_encoder and task is not None and has_spans(task),
    check=_check,
    rows=lambda splits, task, options: (span_rows(splits, task), ()),
    trainer=lambda model, tokenizer, splits, settings: span_trainer(
        model,
        tokenizer,
        settings.training,
        splits,
        max_length=settings.training.max_length,
        stride=settings.run.stride,
    ),
    dtype=torch.float32,
    is_new=True,
)
"""A span predictor: two linear layers over every token."""
