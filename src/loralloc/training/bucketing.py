"""Batches of examples of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

POOL = 50
"""Batches whose examples are sorted by length together; more would save little more padding."""

BUCKETS = "group_by_length"
"""The value of Transformers' `train_sampling_strategy` that asks for this."""


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
            batch_size=self.args.train_batch_size,
            seed=seed,
        )
