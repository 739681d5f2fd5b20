"""Sizes of one adapter, compared on the same held-out examples, pair by pair."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, rank_cost, ranks
from loralloc.allocation.objective import Batch, Objective, count_examples
from loralloc.allocation.record import Size
from loralloc.allocation.shrinking import Difference, is_as_good, paired_difference, still_falls
from loralloc.allocation.supervised import IGNORED


class Comparison:
    """Compares the size that an adapter has with the best of those it had before.

    Args:
        objective: The held-out examples with the loss on them.
        tolerance: By how much a size may be worse; None for one standard error of the difference.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(self, objective: Objective, *, tolerance: float | None, adapter_name: str) -> None:
        self._objective = objective
        self._tolerance = tolerance
        self._adapter_name = adapter_name
        self.best: ExampleLosses | None = None
        """Losses at the best size so far."""

    def size_now(self, *, step: int, stays: bool = False) -> Size:
        """Measure the adapter as it is now.

        Args:
            step: Optimiser steps so far, for the record.
            stays: Whether the size stays whatever its loss.

        Raises:
            ArithmeticError: A loss is not finite.
        """
        now = replicas.agreed(example_losses(self._objective))
        if not bool(now.sums.isfinite().all()):
            raise ArithmeticError(
                f"The held-out loss at step {step} is not finite, so that sizes of the adapter "
                "cannot be compared; lower the learning rate or check the data."
            )
        difference = Difference(0.0, 0.0)
        if self.best is not None:
            difference = paired_difference(self.best.sums, now.sums, now.counts)
        if self.best is None or now.mean < self.best.mean:
            self.best = now
        model, name = self._objective.model, self._adapter_name
        by_module = ranks(lora_layers(model, name), name)
        return Size(
            step=step,
            parameters=num_parameters(model, name),
            ranks=sum(by_module.values()),
            modules=len(by_module),
            loss=now.mean,
            worse_by=difference.mean,
            standard_error=difference.standard_error,
            kept=stays or is_as_good(difference, self._tolerance),
            falling=still_falls(difference, self._tolerance),
        )


def costs(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Parameters of a rank, by module."""
    return {name: rank_cost(layer) for name, layer in lora_layers(model, adapter_name).items()}


def num_parameters(model: nn.Module, adapter_name: str) -> int:
    """LoRA parameters of an adapter."""
    layers = lora_layers(model, adapter_name)
    cost = costs(model, adapter_name)
    return sum(rank * cost[name] for name, rank in ranks(layers, adapter_name).items())


class ExampleLosses(NamedTuple):
    """Losses of held-out examples, in the order of the batches."""

    sums: Tensor
    """Loss of each example, summed over its targets: float64 on the CPU, shape (num_examples,)."""

    counts: Tensor
    """Its targets, of the same kind and shape."""

    @property
    def mean(self) -> float:
        """Mean loss over all targets."""
        return float(self.sums.sum() / self.counts.sum())


def example_losses(objective: Objective) -> ExampleLosses:
    """The losses of an objective's batches, one example after the other.

    Where an example can not be told from its batch, the batch counts as one: a trainer's own loss
    is known as a mean only, and rows that are packed together are one.

    Args:
        objective: With batches.
    """
    sums, counts = [], []
    with objective.evaluating(), torch.no_grad():
        for batch in objective.batches:
            losses = objective.losses(batch).detach().double().cpu()
            for part in _by_example(losses, batch):
                sums.append(part.sum())
                counts.append(len(part) if part.ndim else objective.count_targets(batch))
    return ExampleLosses(torch.stack(sums), torch.tensor(counts, dtype=torch.float64))


def divide(objective: Objective, num_examples: int) -> tuple[Objective, Objective]:
    """Two objectives on the same model and loss, each with some of the batches.

    Batches of like length lie side by side, so that the first takes one here and there, half of
    them at most. With a single batch both have it.

    Args:
        objective: With batches.
        num_examples: About how many examples the first is to have, or 0; the second gets the rest.
    """
    batches = objective.batches
    if not num_examples:
        return with_batches(objective, ()), objective
    if len(batches) < 2:
        return objective, objective
    wanted = round(num_examples * len(batches) / sum(map(count_examples, batches)))
    count = max(1, min(wanted, len(batches) // 2))
    chosen = {(2 * k + 1) * len(batches) // (2 * count) for k in range(count)}
    first, second = (
        [batch for i, batch in enumerate(batches) if (i in chosen) == is_first]
        for is_first in (True, False)
    )
    return with_batches(objective, first), with_batches(objective, second)


def with_batches(objective: Objective, batches: Sequence[Batch]) -> Objective:
    """The same loss on other batches, which may be none."""
    part = copy.copy(objective)
    part.batches = list(batches)
    part.num_targets = sum(map(part.count_targets, part.batches))
    return part


def _by_example(losses: Tensor, batch: Batch) -> list[Tensor]:
    """The losses of a batch's targets, divided by example; whole where it cannot be divided."""
    if not losses.ndim:
        return [losses]
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return list(losses.unsqueeze(1))
    per_row = (labels[:, 1:] != IGNORED).sum(dim=1)
    if int(per_row.sum()) != len(losses):
        return [losses]
    return [part for part in torch.split(losses, per_row.tolist()) if len(part)]
