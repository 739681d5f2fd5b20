"""The scoring batch B_val, drawn from a Trainer's development set, and the loss on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer

from loralloc.allocation.checkpointing import can_be_kept
from loralloc.allocation.objective import Batch, Objective
from loralloc.training.own_loss import own_loss

logger = logging.getLogger(__name__)

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The numbers that Accelerate's mixed precision computes with, by its name for it."""


def objective(trainer: Trainer, batches: Sequence[Batch] | None) -> Objective:
    """What importance is measured by: the trainer's loss, on these batches.

    The loss is computed once, so that what cannot work is told at the start.

    Args:
        trainer: Its model is the adapted one.
        batches: The scoring batch; None where only losses of other batches are asked for.

    Raises:
        TypeError: The trainer has no loss on held-out examples.
        ValueError: It could not be computed.
    """
    mixed = MIXED.get(trainer.accelerator.mixed_precision)
    found = Objective(trainer.model, batches, loss=own_loss(trainer), mixed=mixed)
    if batches is None:
        return found
    try:
        rounding = found.rounding
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(
            f"The loss of this {type(trainer).__name__} could not be computed on held-out examples "
            f"({type(error).__name__}: {reason}), so that importance cannot be measured; see that "
            'trainer.evaluate() runs, or use `score="sensitivity"`, which needs no such loss.'
        ) from error
    if rounding:
        logger.info("Losses are rounded to %s, too coarse for exact scores of ranks.", rounding)
    return found


def draw(trainer: Trainer, dataset: Any, *, num_examples: int, seed: int) -> list[Batch]:
    """Draw held-out examples once and collate them as the trainer does, in micro-batches.

    Micro-batches are half as large as training's, so that scoring holds less memory than a step
    even where held-out examples are longer; examples of like length go together, which saves
    padding. Where activation checkpointing rests in evaluation mode, which scoring runs in, a
    micro-batch is one example: where it is reentrant, or not done by layers of Transformers.

    Args:
        trainer: Its collator, columns and batch size are used.
        dataset: The development set, as the trainer would evaluate on it.
        num_examples: How many to draw.
        seed: Seed of the draw.

    Raises:
        ValueError: The set is missing, has no length, or is too small.
    """
    if dataset is None:
        raise ValueError(
            "Importance is measured on held-out examples, but the trainer has no `eval_dataset`; "
            "give it one, or pass `scoring_dataset=` to attach()."
        )
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Scoring examples cannot be drawn from a {type(dataset).__name__}; pass one dataset "
            "with a length as `scoring_dataset=` to attach()."
        )
    if num_examples > len(dataset):
        raise ValueError(
            f"`scoring_examples` is {num_examples}, but the development set has {len(dataset)} "
            "examples; lower it or give more held-out data."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(dataset), generator=generator)[:num_examples].tolist())
    collate = trainer.data_collator
    if hasattr(dataset, "column_names"):
        dataset = trainer._remove_unused_columns(dataset, description="scoring")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="scoring")
    examples = sorted((dataset[index] for index in chosen), key=_length)
    size = 1 if _checkpointing_rests(trainer) else trainer.args.per_device_train_batch_size // 2
    size = max(1, size)
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _checkpointing_rests(trainer: Trainer) -> bool:
    """Whether training computes activations again, and scoring does not."""
    args = trainer.args
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, False):
            options = getattr(args, f"{name}_kwargs", None) or {}
            if options.get("use_reentrant") or not can_be_kept(trainer.model):
                return True
    return False


def _length(example: Any) -> int:
    """Tokens of an example; where it has several texts, of the longest."""
    if not isinstance(example, Mapping):
        return 0
    if "input_ids" in example:
        return len(example["input_ids"])
    return max((len(part) for part in example.values() if isinstance(part, list)), default=0)
