"""Drawing the scoring batch B_val from a Trainer's development set."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from loralloc.allocation.objective import Batch


def draw(trainer: Trainer, dataset: Any, *, num_examples: int, seed: int) -> list[Batch]:
    """Draw held-out examples once and collate them as the trainer does, in micro-batches.

    Micro-batches are half as large as training's, so that scoring holds less memory than a step
    even where held-out examples are longer; examples of like length go together, which saves
    padding. Scoring runs in evaluation mode, where activation checkpointing rests, so with it a
    micro-batch is one example.

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
    args = trainer.args
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    size = 1 if checkpointing else max(1, args.per_device_train_batch_size // 2)
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _length(example: Any) -> int:
    return len(example["input_ids"]) if "input_ids" in example else 0
