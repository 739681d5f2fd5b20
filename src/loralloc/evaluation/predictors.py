"""From examples to predicted texts: one way for each kind of trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loralloc.evaluation.classifiers import predict_labels
from loralloc.evaluation.generation import respond
from loralloc.evaluation.labels import encode_labels, score_endings
from loralloc.evaluation.prompts import batches, encode
from loralloc.evaluation.request import Decoding
from loralloc.evaluation.spans import predict_spans
from loralloc.runs.trained import load_trained
from loralloc.tasks.task import Example, Task


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model ready to predict, and the batches that it does so in."""

    model: Any
    """The model, on the device it runs on."""

    groups: list[list[int]]
    """Indices of the examples of each batch."""

    truncated: set[int]
    """Indices of the examples whose prompt is cut at its beginning."""

    predict: Callable[[Sequence[int]], list[str]]
    """From indices to their predictions."""


def language_model(
    folder: Path,
    task: Task,
    examples: Sequence[Example],
    decoding: Decoding,
    *,
    batch_size: int,
    with_adapter: bool,
) -> Predictor:
    """Answers of a language model, generated or chosen among the labels.

    Raises:
        ValueError: As `prompts.encode` and `labels.encode_labels`.
    """
    model, tokenizer = load_trained(folder, with_adapter=with_adapter)
    prompts = [example.prompt for example in examples]
    room = decoding.max_new_tokens
    token_ids, cut = encode(model, tokenizer, prompts, max_new_tokens=room, truncate=True)

    def generate(indices: Sequence[int]) -> list[str]:
        return respond(
            model,
            tokenizer,
            [token_ids[i] for i in indices],
            max_new_tokens=room,
            num_beams=decoding.num_beams,
        )

    def choose(indices: Sequence[int]) -> list[str]:
        endings = encode_labels(tokenizer, [prompts[i] for i in indices], task.labels)
        scores = score_endings(model, [token_ids[i] for i in indices], endings)
        return [task.labels[best] for best in scores.argmax(dim=1).tolist()]

    by_labels = decoding.decode == "labels"
    return Predictor(
        model=model,
        groups=batches(
            [len(ids) + room for ids in token_ids],
            batch_size=batch_size,
            copies=len(task.labels) if by_labels else decoding.num_beams,
        ),
        truncated=set(cut),
        predict=choose if by_labels else generate,
    )


def classifier(
    folder: Path,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int | None,
) -> Predictor:
    """Labels that a sequence classifier chooses.

    Raises:
        ValueError: If the classifier's labels are not the task's.
    """
    model, tokenizer = load_trained(folder, head="classification")
    own = tuple(model.config.id2label.values())
    if own != task.labels:
        raise ValueError(
            f"The classifier in {folder} has the labels {', '.join(own)}, and those of the task "
            f"{task.name} are {', '.join(task.labels) or 'none'}; evaluate the task it was "
            "trained on."
        )
    return _encoder(
        model,
        examples,
        partial(predict_labels, model, tokenizer, batch_size=batch_size, max_length=max_length),
        batch_size=batch_size,
    )


def span_predictor(
    folder: Path,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int | None,
    stride: int | None,
) -> Predictor:
    """Answers that a span head finds in their contexts.

    Raises:
        ValueError: If an example has no span, or a question leaves no room for its context.
    """
    model, tokenizer = load_trained(folder, head="span")
    predict = partial(
        predict_spans,
        model,
        tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        stride=stride,
    )
    return _encoder(model, examples, predict, batch_size=batch_size)


def _encoder(
    model: Any,
    examples: Sequence[Example],
    predict: Callable[[Sequence[Example]], list[str]],
    *,
    batch_size: int,
) -> Predictor:
    lengths = [1 + len(encoder_input(example)) // 4 for example in examples]  # tokens, about
    return Predictor(
        model=model,
        groups=batches(lengths, batch_size=batch_size),
        truncated=set(),
        predict=lambda indices: predict([examples[i] for i in indices]),
    )


def encoder_input(example: Example) -> str:
    """What an encoder reads, for people: two texts, or question and context, line by line."""
    if example.span is not None:
        return f"{example.span.question}\n{example.span.context}"
    return "\n".join(text for text in (example.text, example.text_pair) if text is not None)
