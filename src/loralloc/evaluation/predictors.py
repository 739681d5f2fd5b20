"""From examples to predicted texts: one way for each head that a run may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from loralloc.evaluation.classifiers import predict_labels
from loralloc.evaluation.generation import respond
from loralloc.evaluation.labels import encode_labels, score_endings
from loralloc.evaluation.prompts import batches, encode
from loralloc.evaluation.request import Decoding, Request, decoding_of, no_decoding
from loralloc.evaluation.spans import predict_spans
from loralloc.evaluation.tokens import end_tokens
from loralloc.runs.folder import saved_conversation
from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.heads.span import SPAN
from loralloc.runs.models import longest_input
from loralloc.runs.trained import load_trained
from loralloc.tasks.conversations import Prompt
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


class LoadPredictor(Protocol):
    """Loads the model of a run for examples of a task, given the run's saved settings."""

    def __call__(
        self,
        request: Request,
        task: Task,
        examples: Sequence[Example],
        *,
        decoding: Any,
        saved: Mapping[str, Any],
    ) -> Predictor:
        """The predictor."""


def language_model(
    request: Request,
    task: Task,
    examples: Sequence[Example],
    *,
    decoding: Decoding,
    saved: Mapping[str, Any],
) -> Predictor:
    """Answers of a language model, generated or chosen among the labels.

    Raises:
        ValueError: As `prompts.encode` and `labels.encode_labels`.
    """
    model, tokenizer = load_trained(
        request.run,
        with_adapter=not request.base,
        trust_remote_code=request.trust_remote_code,
    )
    conversation = saved_conversation(request.run)
    prompts: list[Prompt] = [
        conversation.ask(example.prompt) if conversation else example.prompt for example in examples
    ]
    ends = end_tokens(tokenizer, prompts)
    room = decoding.max_new_tokens
    token_ids, cut = encode(model, tokenizer, prompts, max_new_tokens=room, truncate=True)

    def generate(indices: Sequence[int]) -> list[str]:
        return respond(
            model,
            tokenizer,
            [token_ids[i] for i in indices],
            ends=ends,
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
            batch_size=request.batch_size,
            copies=len(task.labels) if by_labels else decoding.num_beams,
        ),
        truncated=set(cut),
        predict=choose if by_labels else generate,
    )


def classifier(
    request: Request,
    task: Task,
    examples: Sequence[Example],
    *,
    decoding: None,
    saved: Mapping[str, Any],
) -> Predictor:
    """Labels that a sequence classifier chooses.

    Raises:
        ValueError: If the classifier's labels are not the task's.
    """
    model, tokenizer = load_trained(
        request.run, head=CLASSIFICATION, trust_remote_code=request.trust_remote_code
    )
    own = tuple(model.config.id2label.values())
    if own != task.labels:
        raise ValueError(
            f"The classifier in {request.run} has the labels {', '.join(own)}, and those of the "
            f"task {task.name} are {', '.join(task.labels) or 'none'}; evaluate the task it was "
            "trained on."
        )
    size, max_length = request.batch_size, saved.get("max_length")
    predict = partial(predict_labels, model, tokenizer, batch_size=size, max_length=max_length)
    cut = _cut(tokenizer, examples, longest_input(model, tokenizer, max_length))
    return _encoder(model, examples, predict, batch_size=size, truncated=cut)


def span_predictor(
    request: Request,
    task: Task,
    examples: Sequence[Example],
    *,
    decoding: None,
    saved: Mapping[str, Any],
) -> Predictor:
    """Answers that a span head finds in their contexts.

    Raises:
        ValueError: If an example has no span, or a question leaves no room for its context.
    """
    model, tokenizer = load_trained(
        request.run, head=SPAN, trust_remote_code=request.trust_remote_code
    )
    predict = partial(
        predict_spans,
        model,
        tokenizer,
        batch_size=request.batch_size,
        max_length=saved.get("max_length"),
        stride=saved.get("stride"),
    )
    return _encoder(model, examples, predict, batch_size=request.batch_size)


def _encoder(
    model: Any,
    examples: Sequence[Example],
    predict: Callable[[Sequence[Example]], list[str]],
    *,
    batch_size: int,
    truncated: set[int] | None = None,
) -> Predictor:
    lengths = [1 + len(encoder_input(example)) // 4 for example in examples]  # tokens, about
    return Predictor(
        model=model,
        groups=batches(lengths, batch_size=batch_size),
        truncated=truncated or set(),
        predict=lambda indices: predict([examples[i] for i in indices]),
    )


def _cut(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], longest: int) -> set[int]:
    """Indices of the examples that have more tokens than a classifier reads."""
    texts, pairs = ([getattr(e, name) for e in examples] for name in ("text", "text_pair"))
    found = tokenizer(texts, pairs if any(pairs) else None, verbose=False)["input_ids"]
    return {index for index, ids in enumerate(found) if len(ids) > longest}


def encoder_input(example: Example) -> str:
    """What an encoder reads, for people: two texts, or question and context, line by line."""
    if example.span is not None:
        return f"{example.span.question}\n{example.span.context}"
    return "\n".join(text for text in (example.text, example.text_pair) if text is not None)


@dataclass(frozen=True, kw_only=True)
class Way:
    """What of an evaluation depends on the head of the run."""

    settle: Callable[[Request, Task], Decoding | None]
    """How a language model answers; options that only one reads are refused for the others."""

    shown: Callable[[Example], str]
    """What the model is given of an example, for people."""

    load: LoadPredictor
    """From a run folder to predictions."""


WAYS = {
    "lm": Way(settle=decoding_of, shown=lambda example: example.prompt, load=language_model),
    "classification": Way(
        settle=partial(no_decoding, head="classification"), shown=encoder_input, load=classifier
    ),
    "span": Way(settle=partial(no_decoding, head="span"), shown=encoder_input, load=span_predictor),
}
"""By the name of the head."""
