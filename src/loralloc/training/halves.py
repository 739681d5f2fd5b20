"""One half of the training examples for the weights, the other for what chooses among them.

Methods that search for a structure by first-order bi-level optimisation (Liu et al. 2019, DARTS)
train their weights on half 1 and their gates on half 2, and afterwards the weights on everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler, Subset
from transformers import Trainer

from loralloc.allocation.objective import Batch
from loralloc.allocation.schedule import steps_per_epoch


def second_half(
    trainer: Trainer, *, until_step: int, seed: int
) -> tuple[Iterator[Batch], Callable[..., Sampler[int]]]:
    """Keep half of the training examples from the weights until a step, and give them here.

    Until then an epoch goes through half 1 twice, so that it has as many steps as before: epochs
    go on to mean the same amount of training of the weights. From `until_step` on the trainer sees
    all examples, in its own order, in passes that begin there. What a step sees depends on the
    seeds and the number of the step alone, so a resumed run sees what an unbroken one would have
    seen.

    Call it once, after the trainer's arguments are final; nothing of the trainer is changed.

    Args:
        trainer: Its collator, columns, batch size and sampler are used, so that batches of both
            halves have like lengths where the trainer's have.
        until_step: Optimiser steps during which the weights see half 1 only.
        seed: Seed of the division. Where the number of examples is odd, half 1 has one more.

    Returns:
        Batches of half 2 without end, on the trainer's device. Each step of the trainer has as
        many of them as it accumulates batches; the first asked for in a step is that step's first.
        And what is to take the place of the trainer's `_get_train_sampler` while it trains.

    Raises:
        ValueError: The training set cannot be divided.
    """
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__") or len(dataset) < 2:
        what = f"has {len(dataset)}" if hasattr(dataset, "__len__") else "has no length"
        raise ValueError(
            "A search trains weights on one half of the training examples and what it searches for "
            f"on the other, but the training set {what}; use one with at least 2 examples."
        )
    if trainer.args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy` is 'batch_rebalance', which places whole batches, so that "
            "one half of the training examples cannot be kept back; use 'random' or "
            "'group_by_length'."
        )
    if type(trainer).get_train_dataloader is not Trainer.get_train_dataloader:
        raise ValueError(
            f"The {type(trainer).__name__} has a `get_train_dataloader` of its own, by which the "
            "weights would see all training examples, while one half of them is to be kept back "
            "for a search; leave it out, or use what needs no halves (`score` of 'gradient', say)."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    first, second = (sorted(half.tolist()) for half in order.tensor_split(2))
    own_sampler = trainer._get_train_sampler

    @functools.wraps(own_sampler)
    def sampler_of_half(train_dataset: Any = None) -> Sampler[int]:
        whole = trainer.train_dataset if train_dataset is None else train_dataset
        return HalfSampler(
            _Order(own_sampler(whole), seed),
            _Order(own_sampler(_part(whole, first)), seed),
            rows=first,
            until_step=until_step,
            batch_size=trainer._train_batch_size * trainer.args.world_size,
            accumulation_steps=trainer.args.gradient_accumulation_steps,
            drop_last=trainer.args.dataloader_drop_last,
        )

    return _SecondHalf(trainer, _part(dataset, second), own_sampler, seed), sampler_of_half


class HalfSampler(Sampler[int]):
    """Half of the examples twice an epoch until a step, then all of them in passes from there.

    Args:
        everything: The order of all examples.
        half: The order of the examples of the half, by their place in it.
        rows: The examples of the half.
        until_step: Optimiser steps that see the half only.
        batch_size: Examples of a batch, of all processes together.
        accumulation_steps: Batches of an optimiser step.
        drop_last: Whether an epoch leaves out its last and smaller batch.
    """

    def __init__(
        self,
        everything: _Order,
        half: _Order,
        *,
        rows: Sequence[int],
        until_step: int,
        batch_size: int,
        accumulation_steps: int,
        drop_last: bool,
    ) -> None:
        self._length, self._half, self._rows = len(everything), half, rows
        self._until_step = until_step
        self._examples_per_step = batch_size * accumulation_steps
        used = len(everything) - len(everything) % batch_size if drop_last else len(everything)
        self._steps_per_epoch = steps_per_epoch(
            used, batch_size=batch_size, accumulation_steps=accumulation_steps
        )
        self._pass = functools.lru_cache(maxsize=1)(everything.of)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the trainer calls it before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        begin = self._epoch * self._steps_per_epoch
        steps_left = max(self._until_step - begin, 0)
        num_from_half = min(steps_left * self._examples_per_step, len(self))
        if num_from_half:
            yield from self._twice()[:num_from_half]
        for step in range(max(self._until_step, begin), begin + self._steps_per_epoch):
            left = len(self) - (step - begin) * self._examples_per_step
            yield from self._after_search(step - self._until_step)[:left]

    def _after_search(self, step: int) -> list[int]:
        """Examples of one of the steps that begin with the search's end.

        Passes over everything begin there, not with an epoch: what an epoch's rest leaves out would
        never be seen in a run of one pass.
        """
        number, place = divmod(step, self._steps_per_epoch)
        order = self._pass(-(-self._until_step // self._steps_per_epoch) + number)
        first = place * self._examples_per_step
        rows = order[first : first + self._examples_per_step]
        # The last step of a pass is a small one; within an epoch it is filled up.
        return rows + order[: self._examples_per_step - len(rows)]

    def _twice(self) -> list[int]:
        """Two passes over the half; batches of like length stay whole, what is over comes last."""
        first, second = (self._half.of(2 * self._epoch + number) for number in (0, 1))
        whole = len(first) - len(first) % self._examples_per_step
        order = first[:whole] + second[:whole] + first[whole:] + second[whole:]
        return [self._rows[index] for index in order[: len(self)]]


class _Order:
    """A sampler's order of an epoch as a function of its number, whatever was drawn before."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed = sampler, seed

    def __len__(self) -> int:
        return len(self._sampler)

    def of(self, epoch: int) -> list[int]:
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        else:  # Transformers' own samplers draw from the global generator without one of theirs
            self._sampler.generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return list(self._sampler)


class _SecondHalf(Iterator[Batch]):
    """See `second_half`."""

    def __init__(self, trainer: Trainer, examples: Any, sampler_of: Any, seed: int) -> None:
        self._trainer = trainer
        self._collate = trainer.data_collator
        if hasattr(examples, "column_names"):
            examples = trainer._remove_unused_columns(examples, description="second half")
        else:
            self._collate = trainer._get_collator_with_removed_columns(
                self._collate, description="second half"
            )
        self._examples = examples
        self._order = _Order(sampler_of(examples), seed)
        self._pass = functools.lru_cache(maxsize=1)(self._order.of)
        self._step, self._num_given = -1, 0

    def __next__(self) -> Batch:
        step = self._trainer.state.global_step
        self._num_given = self._num_given + 1 if step == self._step else 0
        self._step = step
        number = step * self._trainer.args.gradient_accumulation_steps + self._num_given
        args = self._trainer.args
        size = min(self._trainer._train_batch_size * args.world_size, len(self._examples))
        epoch, index = divmod(number, len(self._examples) // size)
        rows = self._pass(epoch)[index * size : (index + 1) * size]
        # Of the processes' batch, in the order in which they are given the others.
        share = max(1, size // args.world_size)
        first = min(args.process_index * share, size - share)
        rows = rows[first : first + share]
        batch: Batch = self._trainer._prepare_inputs(
            self._collate([self._examples[row] for row in rows])
        )
        return batch


def _part(dataset: Any, rows: Sequence[int]) -> Any:
    """Some examples of a dataset."""
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)
