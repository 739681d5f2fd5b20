"""Sizes of one adapter, compared on the same held-out examples, pair by pair."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.allocation.objective import Batch, Objective, count_examples
from loralloc.allocation.supervised import IGNORED


def num_parameters(by_module: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Parameters of so many ranks a module, of which each costs what `costs` says."""
    return sum(rank * costs[name] for name, rank in by_module.items())


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


def losses_without(
    objective: Objective,
    off: Mapping[str, Sequence[int]],
    experts: Mapping[str, int],
    *,
    adapter_name: str,
) -> ExampleLosses:
    """The losses with ranks of the adapter switched off, which are as they were afterwards.

    Args:
        objective: With batches.
        off: Indices of ranks by module.
        experts: How many columns of B a rank has, by module, where that is not one.
        adapter_name: PEFT's name of the adapter.
    """
    layers = lora_layers(objective.model, adapter_name)
    columns = {
        name: [i * experts.get(name, 1) + k for i in indices for k in range(experts.get(name, 1))]
        for name, indices in off.items()
    }
    weights = {name: weight_b(layers[name], adapter_name).data for name in columns}
    own = {name: weight[:, columns[name]].clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight[:, columns[name]] = 0
        return example_losses(objective)
    finally:
        for name, weight in weights.items():
            weight[:, columns[name]] = own[name]


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
