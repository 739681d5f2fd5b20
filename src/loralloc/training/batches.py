"""Which examples go together: the scoring batch B_val, and training's batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Sampler, Subset
from transformers import Trainer

from loralloc.allocation.objective import Batch, can_be_kept, count_examples

FEWEST = 4
"""Below so many examples one of them decides; scores of fewer are noise."""

TOKENS = "input_ids"
"""The column that an example is tokenised into."""

POOL = 50
"""Batches whose examples are sorted by length together; more would save little more padding."""

BUCKETS = "group_by_length"
"""The value of Transformers' `train_sampling_strategy` that asks for this."""


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
            f"measured on all {wanted} held-out examples, fewer than the {num_examples} that were "
            "asked for"
        )
    batches = draw(trainer, dataset, num_examples=wanted, seed=seed)
    return batches, "; ".join(notes)


def draw(trainer: Trainer, dataset: Any, *, num_examples: int, seed: int) -> list[Batch]:
    """Draw held-out examples once and collate them as the trainer does, in micro-batches.

    Micro-batches are half as large as training's, so that scoring holds less memory than a step
    even where held-out examples are longer; examples of like length go together, which saves
    padding. Where activation checkpointing rests in evaluation mode, which scoring runs in, a
    micro-batch is one example: where it is reentrant, or not done by layers of Transformers. A
    trainer with an evaluation loader of its own makes the batches by it, at its size: the loss of
    one that contrasts the examples of a batch depends on how many there are.

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
    _check_prepared(trainer, dataset)
    if num_examples > len(dataset):
        raise ValueError(
            f"`scoring_examples` is {num_examples}, but the development set has {len(dataset)} "
            "examples; lower it or give more held-out data."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(dataset), generator=generator)[:num_examples].tolist())
    if type(trainer).get_eval_dataloader is not Trainer.get_eval_dataloader:
        return _as_evaluated(trainer, dataset, chosen)
    collate = trainer.data_collator
    if hasattr(dataset, "column_names"):
        dataset = trainer._remove_unused_columns(dataset, description="scoring")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="scoring")
    examples = sorted((dataset[index] for index in chosen), key=_length)
    size = 1 if _checkpointing_rests(trainer) else trainer.args.per_device_train_batch_size // 2
    size = max(1, size)
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _check_prepared(trainer: Trainer, dataset: Any) -> None:
    """Refuse rows as they were before a trainer's data was prepared.

    Raises:
        ValueError: They have no tokens, and the examples that it trains on have.
    """
    given, known = (
        getattr(rows, "column_names", None) for rows in (dataset, trainer.train_dataset)
    )
    if given and known and TOKENS in known and TOKENS not in given:
        raise ValueError(
            f"The scoring examples have the columns {', '.join(given)} and no `{TOKENS}`, which "
            "the trainer's own have; prepare them as its `eval_dataset` is."
        )


def _as_evaluated(trainer: Trainer, dataset: Any, chosen: Sequence[int]) -> list[Batch]:
    """The batches in which the trainer would evaluate on the chosen examples."""
    few = dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)
    batches: list[Batch] = []
    for batch in trainer.get_eval_dataloader(few):
        batches.append(batch)
        if sum(map(count_examples, batches)) >= len(chosen):  # the loader may read another set
            break
    return batches


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


def examples_of_step(trainer: Any) -> int:
    """Examples of an optimiser step, which may be divided among processes and batches.

    What is ordered by so many is the same for a step however it is divided.
    """
    args = trainer.args
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


class BucketSampler(Sampler[int]):
    """Examples in random order, but in batches of like length; the batches in random order too.

    Only the longest batch comes first: what does not fit into memory fails in the first step, and
    an allocator that begins with the largest blocks finds room for all others in them.
    Transformers' own sampler for `group_by_length` leaves all batches sorted, so that a run sees
    its data as a saw tooth of lengths. The order here depends on the seed and the epoch alone, so
    a resumed run sees what an unbroken one would have seen.

    Args:
        lengths: Tokens of every example.
        batch_size: Examples of a batch.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the trainer calls it before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=generator)
        pools = [
            pool[self._lengths[pool].argsort(stable=True)]
            for pool in torch.split(order, POOL * self._batch_size)
        ]
        batches = torch.split(torch.cat(pools), self._batch_size)
        full = [batch for batch in batches if len(batch) == self._batch_size]
        longest = max(full, key=lambda batch: int(self._lengths[batch[-1]]), default=None)
        rest = [batch for batch in batches if len(batch) < self._batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        shuffled.sort(key=lambda batch: batch is not longest)
        for batch in (*shuffled, *rest):
            yield from batch.tolist()


class LengthBuckets:
    """A part of a trainer: `train_sampling_strategy="group_by_length"` by `BucketSampler`."""

    args: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != BUCKETS or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BucketSampler(
            [len(tokens) for tokens in dataset["input_ids"]],
            batch_size=examples_of_step(self),
            seed=seed,
        )
