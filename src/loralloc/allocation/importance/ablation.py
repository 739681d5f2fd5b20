"""Eq. 6 exactly: switch every rank off, and on alone, and measure.

A gate of block l leaves every hidden state before block l as it is. So each block's output is
kept once for the full model and once for the base model, and every ablation starts at its own
block: half the work of whole forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loralloc.allocation.importance.path import gates_at
from loralloc.allocation.importance.prefix import Prefix
from loralloc.allocation.objective import Objective
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
    prefix = Prefix(objective.model, weights_b)
    for batch in objective.batches:
        with prefix.recording() as recording:
            plain_loss += float(objective.loss_sum(batch))
        for name, indices in wanted.items():
            if not indices:
                continue
            found = []
            with prefix.replaying(recording, before=recording.start(name)):
                for index in indices:
                    with _column_changed(weights_b[name], index, added[name][:, index]):
                        found.append(objective.loss_sum(batch))
            losses[name][list(indices)] += torch.stack(found).double().cpu()
    scale = -1 / objective.num_targets
    return {name: loss * scale for name, loss in losses.items()}, plain_loss * scale


@contextmanager
def _column_changed(b: Tensor, index: int, added: Tensor) -> Iterator[None]:
    """Something added to a column of B inside; its very bits are back outside."""
    own = b[:, index].clone()
    b[:, index] += added
    try:
        yield
    finally:
        b[:, index] = own
