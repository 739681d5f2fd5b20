"""Eq. 6 exactly: switch every rank off, and on alone, and measure.

A gate of block l leaves every hidden state before block l as it is. So each block's output is
kept once for the full model and once for the base model, and every ablation starts at its own
block: half the work of whole forward passes. Ablations of one block share passes where that pays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loralloc.allocation.importance.copies import (
    Change,
    changes_of,
    input_shapes,
    num_copies,
    one_a_copy,
    repeated,
)
from loralloc.allocation.importance.path import gates_at
from loralloc.allocation.importance.prefix import Prefix, Recording
from loralloc.allocation.layers import base_model
from loralloc.allocation.objective import Objective, count_examples
from loralloc.allocation.policy import Limits, Scores

RankNames = Mapping[str, Sequence[int]]
"""Indices of ranks by module."""


def score(objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits) -> Scores:
    """Importance of every rank, exactly (Liu et al. 2024, eq. 6).

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: Not read: this score does not depend on what will be pruned.
    """
    everything = {name: tuple(range(b.shape[1])) for name, b in weights_b.items()}
    return measure(objective, weights_b, everything)


def measure(objective: Objective, weights_b: Mapping[str, Tensor], wanted: RankNames) -> Scores:
    """Both terms of eq. 6 for the wanted ranks; the terms of other ranks are NaN."""
    with objective.evaluating(), torch.no_grad():
        off = {name: -b for name, b in weights_b.items()}
        s_off, s_full = _sweep(objective, weights_b, wanted, added=off)
        with gates_at(weights_b, 0) as on:
            s_on, s_base = _sweep(objective, weights_b, wanted, added=on)
    return Scores(
        terms={
            "without": {name: s_full - s for name, s in s_off.items()},
            "only": {name: s - s_base for name, s in s_on.items()},
        },
        s_full=s_full,
        s_base=s_base,
        verified={name: tuple(indices) for name, indices in wanted.items() if indices},
    )


def _sweep(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    wanted: RankNames,
    *,
    added: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """S with one column of `added` added to B, for each wanted rank; and S as it stands."""
    losses = {
        name: torch.full((b.shape[1],), torch.nan, dtype=torch.float64)
        for name, b in weights_b.items()
    }
    for name, indices in wanted.items():
        losses[name][list(indices)] = 0.0
    plain_loss = 0.0
    layers = {name: base_model(objective.model).get_submodule(name) for name in wanted}
    changes = [
        change
        for name, indices in wanted.items()
        for change in changes_of(layers[name], name, weights_b[name], added[name], indices)
    ]
    prefix = Prefix(objective.model, weights_b)
    for batch in objective.batches:
        num_examples = count_examples(batch)
        with prefix.recording() as recording, input_shapes(layers) as shapes:
            plain = objective.losses(batch)
        plain_loss += float(plain.sum())
        most = {
            name: num_copies(
                batch, shape, device=objective.device.type, num_blocks=prefix.num_blocks
            )
            for name, shape in shapes.items()
            # A scalar is the loss of the whole batch, and no copy's share of it is known; outside
            # the blocks, a layer may read one row an example, or one a target.
            if plain.ndim and prefix.block(name) is not None
        }
        for block, together in _passes(recording, changes, most):
            times = len(together)
            with (
                prefix.replaying(recording, before=block, num_examples=num_examples, times=times),
                one_a_copy(together),
            ):
                found = objective.losses(repeated(batch, num_examples, times))
            for change, loss in zip(together, found.view(times, -1).sum(1).tolist(), strict=True):
                losses[change.name][change.index] += loss
    scale = -1 / objective.num_targets
    return {name: loss * scale for name, loss in losses.items()}, plain_loss * scale


def _passes(
    recording: Recording, changes: Sequence[Change], most: Mapping[str, int]
) -> Iterator[tuple[int, Sequence[Change]]]:
    """The forward passes to run: the block where each begins, and the changes it measures.

    Args:
        recording: The blocks' outputs.
        changes: All changes to be measured.
        most: By module, how many may share a pass; 1 where none is given.
    """
    groups = defaultdict(list)
    for change in changes:
        groups[recording.start(change.name), most.get(change.name, 1)].append(change)
    for (block, size), group in groups.items():
        for first in range(0, len(group), size):
            yield block, group[first : first + size]
