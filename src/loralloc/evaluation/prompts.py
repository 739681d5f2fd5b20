"""Prompts on their way into a causal language model: tokens, batches by length, one reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loralloc.allocation.layers import base_model
from loralloc.evaluation.tokens import start_tokens
from loralloc.methods.opening import shares_prompts
from loralloc.tasks.conversations import Chat, Prompt

MAX_BATCH_TOKENS = 2**14
"""Most positions in a batch, over all of its beams or labels, unless one prompt alone has more.

Every position has its keys and values in memory: 0.4 GB in all for a model of 135M parameters, 8 GB
for one of 7B without grouped queries, in bfloat16.
"""


def encode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    truncate: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """Turn prompts into tokens that leave room for a response.

    Args:
        model: The model; its `max_position_embeddings`, where it has one, bounds a prompt.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations to be answered through the tokenizer's chat template.
        max_new_tokens: Room for the response.
        truncate: Cut a longer prompt at its beginning, as its end holds the question; otherwise
            it is refused.

    Returns:
        The tokens of each prompt, and the indices of the prompts that were cut.

    Raises:
        ValueError: If a prompt has no tokens or, unless it may be cut, leaves no room, or if the
            chat template does not take a conversation.
    """
    if not prompts:
        return [], []
    token_ids = start_tokens(tokenizer, prompts)
    config: Any = base_model(model).config
    context: int | None = getattr(config, "max_position_embeddings", None)
    if context is not None and context <= max_new_tokens:
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens}, but the model's context has {context} tokens "
            f"for prompt and response; give at most {context - 1}."
        )
    room = None if context is None else context - max_new_tokens
    cut = []
    for i, ids in enumerate(token_ids):
        if not ids:
            text = text_of(prompts[i])
            raise ValueError(f"Prompt {i + 1} ({text!r}) has no tokens; give it some text.")
        if room is None or len(ids) <= room:
            continue
        if not truncate:
            raise ValueError(
                f"Prompt {i + 1} ({text_of(prompts[i])[:40]!r}...) has {len(ids):,} tokens, but "
                f"the model's "
                f"context of {context:,} less `max_new_tokens` of {max_new_tokens} leaves "
                f"{room:,}; shorten it."
            )
        token_ids[i] = ids[-room:]
        cut.append(i)
    return token_ids, cut


def text_of(prompt: Prompt) -> str:
    """A prompt for people: what is asked."""
    return str(prompt.messages[-1]["content"]) if isinstance(prompt, Chat) else prompt


def batches(
    lengths: Sequence[int], *, batch_size: int, copies: int = 1, max_tokens: int = MAX_BATCH_TOKENS
) -> list[list[int]]:
    """Group sequences of like length, the longest first, so that memory fails early or never.

    Args:
        lengths: Tokens of each sequence, with what is generated.
        batch_size: Most sequences in a batch.
        copies: Rows of a sequence in the batch: its beams, or its labels.
        max_tokens: Most positions in a batch (rows times the longest length); a sequence that has
            more gets a batch of its own.

    Returns:
        The indices of each batch. Sequences of equal length keep their order.
    """
    groups: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = min(batch_size, max_tokens // (width * copies)) if groups else 0
        if not groups or len(groups[-1]) >= max(size, 1):
            groups.append([])
            width = lengths[i]
        groups[-1].append(i)
    return groups


def pad_left(token_ids: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Align sequences at their ends: tokens and attention mask, (num_sequences, longest)."""
    longest = max(len(ids) for ids in token_ids)
    tokens = torch.full((len(token_ids), longest), padding)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(token_ids):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    return tokens, mask


def positions(mask: Tensor) -> Tensor:
    """Number the tokens of each row from 0; padding, which nothing attends to, has 0 too."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def read(model: Any, tokens: Tensor, mask: Tensor, *, copies: int) -> Any | None:
    """Run the model over all but the last token of each prompt, and keep what it remembers.

    Beams and labels go on from one reading of their prompt, instead of reading it once each.

    Args:
        model: The model, evaluating.
        tokens: Prompts padded on the left, (num_prompts, longest).
        mask: Their attention mask.
        copies: How often each prompt's row is repeated in the cache.

    Returns:
        The cache with copies * num_prompts rows, those of a prompt beside each other; None where
        there is nothing to read ahead, or the model has to read a prompt in one pass.
    """
    if tokens.shape[1] < 2 or not shares_prompts(model):
        return None
    mask = mask[:, :-1]
    outputs = model(
        input_ids=tokens[:, :-1],
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = outputs.past_key_values
    cache.batch_repeat_interleave(copies)
    return cache


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a graph; every module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
