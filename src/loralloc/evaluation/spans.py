"""Span prediction: the best stretch of a text over all of its windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from loralloc.evaluation.prompts import evaluating
from loralloc.runs.heads.span import Window, text_of, windows
from loralloc.runs.models import longest_input
from loralloc.tasks.task import Example, Span


def predict_spans(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    max_answer_length: int = 30,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Predict the answer of every example as a stretch of its context.

    The answer is the pair of tokens, the first not behind the last, with the highest
    log p(first) + log p(last) of all windows. Each window's probabilities are over all its tokens,
    so that one that points at [CLS], where no answer is, leaves little to its other tokens.

    Args:
        model: A model with a span head, adapted or not.
        tokenizer: Its tokenizer.
        examples: Each with its `span`, of which answers and starts are not read.
        max_length: Most tokens of a window; never more than the model reads.
        stride: Tokens that neighbouring windows share; a quarter of `max_length` by default.
        max_answer_length: Most tokens of an answer.
        batch_size: Examples, and windows, at once.
        on_batch: Called with the number of examples done after each batch.

    Returns:
        Answers in the order of the examples, as their contexts have them; empty where a context
        has no token.

    Raises:
        ValueError: An example has no span, or its question leaves no room for the context.
    """
    if max_answer_length < 1:
        raise ValueError(f"`max_answer_length` is {max_answer_length}; it must be at least 1.")
    spans = [_span(number, example) for number, example in enumerate(examples, start=1)]
    max_length = longest_input(model, tokenizer, max_length)
    order = sorted(range(len(spans)), key=lambda index: len(spans[index].context))
    answers = [""] * len(spans)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            asked = [spans[index] for index in chosen]
            cut = windows(tokenizer, asked, max_length=max_length, stride=stride)
            highest = [-float("inf")] * len(asked)
            for begin in range(0, len(cut), batch_size):
                batch = cut[begin : begin + batch_size]
                scored = _best_tokens(model, tokenizer, batch, max_answer_length)
                for window, (score, first, last) in zip(batch, scored, strict=True):
                    if score > highest[window.example]:
                        highest[window.example] = score
                        context = asked[window.example].context
                        answers[chosen[window.example]] = text_of(window, context, first, last)
            if on_batch:
                on_batch(start + len(chosen))
    return answers


def _best_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Window], max_answer_length: int
) -> list[tuple[float, int, int]]:
    """Of each window the highest score, minus infinity without context, and its two tokens."""
    tokens = pad_sequence(
        [torch.tensor(window.input_ids) for window in batch],
        batch_first=True,
        padding_value=float(tokenizer.pad_token_id),
    ).to(model.device)
    count, length = tokens.shape
    padding = torch.ones(count, length, dtype=torch.bool, device=tokens.device)
    outside = padding.clone()
    for row, window in enumerate(batch):
        padding[row, : len(window.input_ids)] = False
        outside[row, : len(window.offsets)] = torch.tensor([o is None for o in window.offsets])
    outputs = model(input_ids=tokens, attention_mask=(~padding).long())

    def log_probabilities(logits: Tensor) -> Tensor:
        logits = logits.float().masked_fill(padding, -torch.inf)
        return logits.log_softmax(dim=-1).masked_fill(outside, -torch.inf)

    firsts = log_probabilities(outputs.start_logits)  # (windows, length)
    lasts = log_probabilities(outputs.end_logits)
    allowed = torch.ones(length, length, dtype=torch.bool, device=padding.device)
    allowed = allowed.triu().tril(max_answer_length - 1)  # first <= last, and not too far
    pairs = (firsts[:, :, None] + lasts[:, None, :]).masked_fill(~allowed, -torch.inf)
    scores, indices = pairs.flatten(1).max(dim=1)  # the first of equal ones
    return [
        (score, index // length, index % length)
        for score, index in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


def _span(number: int, example: Example) -> Span:
    if example.span is None:
        raise ValueError(
            f"Example {number} has no span, so there is no context to find its answer in; use a "
            "task whose answers are stretches of a text."
        )
    return example.span
