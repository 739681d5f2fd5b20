"""Classification with an encoder: the label with the highest logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loralloc.evaluation.prompts import evaluating
from loralloc.runs.heads.classification import encode
from loralloc.runs.models import longest_input
from loralloc.tasks.task import Example


def predict_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    **options: Any,
) -> list[str]:
    """The label of every example: that of its highest logit, by name.

    Args:
        model: A sequence classifier, adapted or not, that knows the names of its labels.
        tokenizer: Its tokenizer.
        examples: Each with its `text` and, for tasks about two, its `text_pair`.
        options: Those of `label_logits`.

    Raises:
        ValueError: As `label_logits`.
    """
    names = model.config.id2label
    chosen = label_logits(model, tokenizer, examples, **options).argmax(dim=-1)
    return [names[label] for label in chosen.tolist()]


def label_logits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """What a classifier gives every label of every example.

    Args:
        model: A sequence classifier, adapted or not.
        tokenizer: Its tokenizer.
        examples: Each with its `text` and, for tasks about two, its `text_pair`.
        max_length: Most tokens of an example; never more than the model reads.
        batch_size: Examples at once, those of like length together.
        on_batch: Called with the number of examples done after each batch.

    Returns:
        (examples, labels), float32 on the CPU, in the order of the examples.

    Raises:
        ValueError: An example has no text to classify.
    """
    max_length = longest_input(model, tokenizer, max_length)
    encoded = []
    for number, example in enumerate(examples, start=1):
        if example.text is None:
            raise ValueError(
                f"Example {number} has no text to classify; use a task with labels, such as sst2."
            )
        encoded.append(encode(tokenizer, example.text, example.text_pair, max_length=max_length))
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    found = torch.zeros(len(encoded), model.config.num_labels)
    collate = DataCollatorWithPadding(tokenizer)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs: Any = collate([encoded[index] for index in chosen])
            found[chosen] = model(**inputs.to(model.device)).logits.float().cpu()
            if on_batch:
                on_batch(start + len(chosen))
    return found
