"""Generating responses to prompts, in batches, deterministically."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from loralloc.allocation.layers import base_model
from loralloc.evaluation.prompts import (
    MAX_BATCH_TOKENS,
    batches,
    encode,
    evaluating,
    pad_left,
    read,
)
from loralloc.evaluation.tokens import end_tokens
from loralloc.tasks.conversations import Prompt

BEAM_OPTIONS = {"length_penalty": 1.0, "early_stopping": False}
"""How beams are compared: by the mean log-probability of their tokens, the end token's included,
until no open beam can overtake a finished one (the defaults of Transformers)."""


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 32,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    share_prompts: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate one response a prompt, greedily or with beams.

    Prompts of like length go together, padded on the left; a response ends at the tokenizer's end
    token, and in a conversation where a turn ends. The checkpoint's own generation options (a
    repetition penalty, sampling) are left out.

    Args:
        model: A causal language model, adapted or not.
        tokenizer: Its tokenizer.
        prompts: What to respond to: texts as they are, conversations through the chat template.
        max_new_tokens: Most tokens of a response, the end token included.
        num_beams: Beams; 1 is greedy, the paper has 5.
        batch_size: Most prompts at once.
        max_batch_tokens: Most positions at once, prompts and responses of all beams.
        share_prompts: Read a prompt once for all of its beams; False for a model that must see a
            whole prompt in one forward pass.
        on_batch: Called with the number of prompts done after each batch.

    Returns:
        Responses in the order of the prompts, without the white space around them.

    Raises:
        ValueError: If a prompt has no tokens, leaves no room for a response in the model's context
            or cannot be rendered, or if no token ends a response.
    """
    if not prompts:
        return []
    ends = end_tokens(tokenizer, prompts)
    token_ids, _ = encode(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    groups = batches(
        [len(ids) + max_new_tokens for ids in token_ids],
        batch_size=batch_size,
        copies=num_beams,
        max_tokens=max_batch_tokens,
    )
    responses = [""] * len(prompts)
    num_done = 0
    for group in groups:
        texts = respond(
            model,
            tokenizer,
            [token_ids[i] for i in group],
            ends=ends,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            share_prompts=share_prompts,
        )
        for i, text in zip(group, texts, strict=True):
            responses[i] = text
        num_done += len(group)
        if on_batch:
            on_batch(num_done)
    return responses


def respond(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int] | None = None,
    num_beams: int = 1,
    share_prompts: bool = True,
) -> list[str]:
    """Generate the responses of one batch of tokenised prompts; see `generate`.

    A response ends at any of `ends`, by default the tokenizer's end token.
    """
    ends = list(ends or end_tokens(tokenizer, ()))
    padding = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=padding,
        **(BEAM_OPTIONS if num_beams > 1 else {}),
    )
    tokens, mask = (part.to(model.device) for part in pad_left(token_ids, padding))
    inputs = {"input_ids": tokens, "attention_mask": mask}
    with evaluating(model), _own_options_off(base_model(model)):
        cache = None
        if num_beams > 1 and share_prompts:
            cache = read(model, tokens, mask, copies=num_beams)
        if cache is not None:
            inputs["past_key_values"] = cache
        generated = model.generate(**inputs, generation_config=config)
    answers = [_before(ends, ids) for ids in generated[:, tokens.shape[1] :].tolist()]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _before(ends: Sequence[int], ids: list[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:first]


@contextmanager
def _own_options_off(model: Any) -> Iterator[None]:
    """Without the options in the checkpoint's file, which would fill in those not given here."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
