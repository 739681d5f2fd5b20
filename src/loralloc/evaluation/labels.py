"""Choosing among labels by the probability of each label's text.

For tasks with labels this costs one reading of the prompt and a few tokens more. It is not the
paper's decoding (beam search over all texts): the model cannot answer with something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from loralloc.allocation.supervised import IGNORED, supervised_logits
from loralloc.evaluation.prompts import (
    MAX_BATCH_TOKENS,
    batches,
    encode,
    evaluating,
    pad_left,
    positions,
    read,
    text_of,
)
from loralloc.evaluation.tokens import answered_tokens, end_tokens, start_tokens
from loralloc.methods.opening import show_batch
from loralloc.tasks.conversations import Prompt


def score_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    share_prompts: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Log-probability of each label after each prompt.

    Args:
        model: A causal language model, adapted or not.
        tokenizer: Its tokenizer.
        prompts: What the labels follow.
        labels: The texts of the labels; each is joined to a text by one blank, as in training, and
            to a conversation as its answer.
        batch_size: Most prompts at once.
        max_batch_tokens: Most positions at once, over all labels.
        share_prompts: Read a prompt once for all of its labels; False for a model that must see
            prompt and label in one forward pass.
        on_batch: Called with the number of prompts done after each batch.

    Returns:
        Sums over the tokens of each label and the end token, natural logarithms in float32, of
        shape (num_prompts, num_labels).

    Raises:
        ValueError: If a prompt cannot be encoded, or the tokenizer merges it with a label.
    """
    endings = encode_labels(tokenizer, prompts, labels)
    longest = max((len(ids) for row in endings for ids in row), default=0)
    token_ids, _ = encode(model, tokenizer, prompts, max_new_tokens=longest)
    groups = batches(
        [len(ids) + longest for ids in token_ids],
        batch_size=batch_size,
        copies=len(labels),
        max_tokens=max_batch_tokens,
    )
    scores = torch.zeros(len(prompts), len(labels))
    num_done = 0
    for group in groups:
        scores[group] = score_endings(
            model,
            [token_ids[i] for i in group],
            [endings[i] for i in group],
            share_prompts=share_prompts,
        )
        num_done += len(group)
        if on_batch:
            on_batch(num_done)
    return scores


def encode_labels(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], labels: Sequence[str]
) -> list[list[list[int]]]:
    """Tokens of each label behind each prompt, with the end token.

    Prompt and label are tokenised together, as in training.

    Raises:
        ValueError: If the tokenizer has no end token, or the tokens of a prompt change when a
            label follows, so that the label has no tokens of its own.
    """
    endings: list[list[list[int]]] = [[] for _ in prompts]
    if not prompts:
        return endings
    end = end_tokens(tokenizer, prompts)[0]
    alone = start_tokens(tokenizer, prompts)
    for label in labels:
        together = answered_tokens(tokenizer, prompts, label)
        for prompt, first, both, row in zip(prompts, alone, together, endings, strict=True):
            if both[: len(first)] != first or len(both) == len(first):
                raise ValueError(
                    f"The tokenizer merges the label {label!r} with the end of the prompt "
                    f"{text_of(prompt)[-40:]!r}, so labels cannot be scored; use `--decode beam`."
                )
            row.append([*both[len(first) :], end])
    return endings


def score_endings(
    model: Any,
    prompts: Sequence[Sequence[int]],
    endings: Sequence[Sequence[Sequence[int]]],
    *,
    share_prompts: bool = True,
) -> Tensor:
    """Score the endings of one batch of tokenised prompts, equally many a prompt.

    Returns:
        Shape (num_prompts, num_endings), float32 on the CPU.
    """
    flat = [list(ending) for row in endings for ending in row]
    with evaluating(model):
        tokens, mask = (part.to(model.device) for part in pad_left(prompts, padding=0))
        cache = read(model, tokens, mask, copies=len(endings[0])) if share_prompts else None
        if cache is None:
            scores = _score_whole(model, prompts, flat)
        else:
            scores = _score_from_cache(model, tokens, mask, flat, cache)
    return scores.view(len(prompts), -1).cpu()


def _score_from_cache(
    model: Any, tokens: Tensor, mask: Tensor, endings: list[list[int]], cache: Any
) -> Tensor:
    """Go on from the prompts' last tokens: one short row an ending."""
    targets, present = _pad_right(endings, tokens.device)  # (num_rows, longest ending)
    copies = len(endings) // len(tokens)
    last = tokens[:, -1:].repeat_interleave(copies, dim=0)
    read_already = mask[:, :-1].repeat_interleave(copies, dim=0)
    # The model reads the prompt's last token and the ending without its last, to predict the next.
    whole_mask = torch.cat([read_already, torch.ones_like(last), present[:, :-1]], dim=1)
    logits = model(
        input_ids=torch.cat([last, targets[:, :-1]], dim=1),
        attention_mask=whole_mask,
        position_ids=positions(whole_mask)[:, -targets.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).logits
    chosen = _log_probabilities(logits, targets)
    return (chosen * present).sum(dim=-1)


def _score_whole(model: Any, prompts: Sequence[Sequence[int]], endings: list[list[int]]) -> Tensor:
    """Read prompt and ending in one pass, with the head at the endings only."""
    copies = len(endings) // len(prompts)
    starts = [list(prompt) for prompt in prompts for _ in range(copies)]
    whole = [[*start, *ending] for start, ending in zip(starts, endings, strict=True)]
    tokens, mask = _pad_right(whole, model.device)
    _, is_prompt = _pad_right(starts, model.device)
    labels = tokens.masked_fill(mask == 0, IGNORED)
    labels[:, : is_prompt.shape[1]].masked_fill_(is_prompt == 1, IGNORED)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    show_batch(model, inputs)
    logits, targets = supervised_logits(model, inputs)
    scores = torch.zeros(tokens[:, 1:].shape, device=tokens.device)
    scores[labels[:, 1:] != IGNORED] = _log_probabilities(logits, targets)
    return scores.sum(dim=-1)


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural logarithms at the targets, in float32."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _pad_right(endings: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Align sequences at their beginnings: tokens and mask, (num_sequences, longest)."""
    longest = max(len(ids) for ids in endings)
    tokens = torch.zeros(len(endings), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(endings):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return tokens, mask
