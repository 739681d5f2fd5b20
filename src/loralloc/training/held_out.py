"""The held-out examples that a method measures on: how many, and from which set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import ConcatDataset
from transformers import Trainer

from loralloc.allocation.objective import Batch
from loralloc.training import scoring_batch

FEWEST = 4
"""Below so many examples one of them decides; scores of fewer are noise."""


def held_out(
    trainer: Trainer, dataset: Any, *, num_examples: int, seed: int
) -> tuple[list[Batch], str]:
    """Draw held-out examples; where there are fewer than wanted, all that there are.

    Args:
        trainer: Its collator, columns and batch size are used.
        dataset: A development set; several by name are taken together.
        num_examples: How many are wanted.
        seed: Seed of the draw.

    Returns:
        Micro-batches, and what is otherwise than was asked for, in a sentence or none.

    Raises:
        ValueError: There is no set, it has no length, or too few examples.
    """
    notes = []
    if isinstance(dataset, Mapping) and all(hasattr(part, "__len__") for part in dataset.values()):
        notes.append(f"scoring examples are drawn from {' and '.join(dataset)} together")
        dataset = ConcatDataset(list(dataset.values()))
    there = len(dataset) if hasattr(dataset, "__len__") else num_examples
    wanted = min(num_examples, there)
    if there < min(num_examples, FEWEST):
        raise ValueError(
            f"Importance is measured on held-out examples, and there are {there}, of which one "
            f"would decide; give at least {FEWEST}, better {num_examples}."
        )
    if wanted < num_examples:
        notes.append(
            f"importance is measured on all {wanted} held-out examples, fewer than the "
            f"{num_examples} of `scoring_examples`"
        )
    batches = scoring_batch.draw(trainer, dataset, num_examples=wanted, seed=seed)
    return batches, "; ".join(notes)
