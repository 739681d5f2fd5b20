"""Generating responses to prompts, in batches, deterministically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate one response a prompt, greedily or with beams.

    Prompts of like length go together, padded on the left; a response ends at the tokenizer's end
    token.

    Args:
        model: A causal language model, adapted or not.
        tokenizer: Its tokenizer.
        prompts: What to respond to.
        max_new_tokens: Most tokens of a response.
        num_beams: Beams; 1 is greedy, the paper has 5.
        batch_size: Prompts at once.
        on_batch: Called with the number of prompts done after each batch.

    Returns:
        Responses in the order of the prompts, without the white space around them.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer(
                [prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                tokens = model.generate(**inputs, generation_config=config)
            texts = tokenizer.batch_decode(
                tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                responses[i] = text.strip()
            if on_batch:
                on_batch(start + len(chosen))
    finally:
        model.train(was_training)
    return responses
