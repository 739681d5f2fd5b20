"""The cross-entropy of right answers: what a model gives them, whatever it would say itself.

A score counts answers, so on a few hundred rows it moves by points from one run to the next; the
cross-entropy of the same rows moves far less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loralloc.evaluation.evaluate import Asked
from loralloc.evaluation.labels import score_endings
from loralloc.evaluation.prompts import batches, encode, evaluating
from loralloc.evaluation.tokens import answered_tokens, end_tokens, start_tokens
from loralloc.runs.folder import saved_conversation
from loralloc.runs.heads.classification import encode as encode_text
from loralloc.runs.heads.span import answer_tokens, windows
from loralloc.runs.models import longest_input
from loralloc.runs.trained import load_trained, saved_settings
from loralloc.tasks.conversations import Prompt
from loralloc.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class CrossEntropies:
    """Natural logarithms, in float32."""

    mean: float
    """Over all targets: tokens of the right answers with their end tokens, labels, or first and
    last tokens of spans."""

    by_example: list[float]
    """The mean over each example's own targets."""


def cross_entropies(asked: Asked) -> CrossEntropies:
    """The cross-entropy of every example's right answers under a run's model.

    Of several references each is read, and every token counts once. A span's is that of its first
    and last token, in the first window that holds it.

    Args:
        asked: As `evaluate.read` gives it.

    Raises:
        ValueError: A right answer cannot be encoded.
    """
    request = asked.request
    model, tokenizer = load_trained(
        request.run,
        with_adapter=not request.base,
        head=asked.head,
        trust_remote_code=request.trust_remote_code,
    )
    saved = saved_settings(request.run)
    sums, counts = _WAYS[asked.head.name](
        model,
        tokenizer,
        asked.examples,
        batch_size=request.batch_size,
        max_length=saved.get("max_length"),
        stride=saved.get("stride"),
        prompts=_prompts(asked),
    )
    return CrossEntropies(
        mean=sum(sums) / sum(counts),
        by_example=[total / count for total, count in zip(sums, counts, strict=True)],
    )


Sums = tuple[list[float], list[int]]
"""Of every example the sum over its targets, and their number."""


def _prompts(asked: Asked) -> list[Prompt]:
    conversation = saved_conversation(asked.request.run)
    prompts = [example.prompt for example in asked.examples]
    return [conversation.ask(prompt) if conversation else prompt for prompt in prompts]


def _of_language_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    prompts: Sequence[Prompt],
    **_: Any,
) -> Sums:
    """Tokens of every reference, or of the response where there is none, and the end token."""
    owners, asked, endings = [], [], []
    end = end_tokens(tokenizer, prompts)[0]
    starts = start_tokens(tokenizer, prompts)
    for index, (example, prompt, start) in enumerate(zip(examples, prompts, starts, strict=True)):
        right = (example.response,) if example.label is not None else example.references
        for text in right or (example.response,):
            (both,) = answered_tokens(tokenizer, [prompt], text)
            if both[: len(start)] != start or len(both) == len(start):
                raise ValueError(
                    f"The tokenizer merges the answer {text[:40]!r} with the end of its prompt, so "
                    "it has no tokens of its own to measure."
                )
            owners.append(index)
            asked.append(prompt)
            endings.append([*both[len(start) :], end])
    longest = max(map(len, endings))
    token_ids, _cut = encode(model, tokenizer, asked, max_new_tokens=longest, truncate=True)
    lengths = [len(ids) + len(ending) for ids, ending in zip(token_ids, endings, strict=True)]
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    for group in batches(lengths, batch_size=batch_size):
        scores = score_endings(model, [token_ids[i] for i in group], [[endings[i]] for i in group])
        for i, score in zip(group, scores[:, 0].tolist(), strict=True):
            sums[owners[i]] -= score
            counts[owners[i]] += len(endings[i])
    return sums, counts


def _of_classifier(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int | None,
    **_: Any,
) -> Sums:
    """The right label."""
    longest = longest_input(model, tokenizer, max_length)
    collate = DataCollatorWithPadding(tokenizer)
    sums: list[float] = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            chosen = examples[start : start + batch_size]
            assert all(example.text is not None for example in chosen), "the test has read them"
            inputs: Any = collate(
                [
                    encode_text(tokenizer, e.text or "", e.text_pair, max_length=longest)
                    for e in chosen
                ]
            )
            logits = model(**inputs.to(model.device)).logits.float()
            labels = torch.tensor([e.label for e in chosen], device=logits.device)
            sums += F.cross_entropy(logits, labels, reduction="none").tolist()
    return sums, [1] * len(sums)


def _of_span_head(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int | None,
    stride: int | None,
    **_: Any,
) -> Sums:
    """First and last token of the right answer."""
    longest = longest_input(model, tokenizer, max_length)
    spans = [example.span for example in examples if example.span is not None]
    assert len(spans) == len(examples), "the test has read them"
    held: dict[int, tuple[list[int], tuple[int, int]]] = {}
    for window in windows(tokenizer, spans, max_length=longest, stride=stride):
        target = answer_tokens(window, spans[window.example])
        if target and window.example not in held:
            held[window.example] = window.input_ids, target
    lost = next((i for i in range(len(spans)) if i not in held), None)
    if lost is not None:
        raise ValueError(
            f"No window of {longest} tokens holds the whole answer of example {lost + 1}, "
            f"{spans[lost].answers[0]!r:.60}, so it has no cross-entropy; raise `max_length`."
        )
    sums: list[float] = []
    collate = DataCollatorWithPadding(tokenizer)
    with evaluating(model):
        for start in range(0, len(spans), batch_size):
            chosen = [held[i] for i in range(start, min(start + batch_size, len(spans)))]
            inputs: Any = collate([{"input_ids": ids} for ids, _target in chosen])
            inputs = inputs.to(model.device)
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            losses = torch.zeros(len(chosen))
            for logits, which in ((outputs.start_logits, 0), (outputs.end_logits, 1)):
                targets = torch.tensor([t[which] for _ids, t in chosen], device=logits.device)
                # Padding is no token that an answer could begin at.
                bare = logits.float().masked_fill(inputs["attention_mask"] == 0, -torch.inf)
                losses += F.cross_entropy(bare, targets, reduction="none").cpu()
            sums += losses.tolist()
    return sums, [2] * len(sums)


_WAYS: dict[str, Callable[..., Sums]] = {
    "lm": _of_language_model,
    "classification": _of_classifier,
    "span": _of_span_head,
}
"""By the name of the head."""
