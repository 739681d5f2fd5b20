"""Eq. 6 exactly: switch every rank off, and on alone, and measure.

A gate of block l leaves every hidden state before block l as it is. So each block's output is
kept once for the full model and once for the base model, and every ablation starts at its own
block: half the work of whole forward passes and, bit for bit, the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.allocation.importance.path import gates_at
from loralloc.allocation.layers import block_index, block_list
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
        zeros = {name: torch.zeros_like(b) for name, b in weights_b.items()}
        s_off, s_full = _sweep(objective, weights_b, wanted, columns=zeros)
        with gates_at(weights_b, 0) as trained:
            s_on, s_base = _sweep(objective, weights_b, wanted, columns=trained)
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
    columns: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """S with one column of B put in from `columns`, for each wanted rank; and S as it stands."""
    losses = {
        name: torch.full((b.shape[1],), torch.nan, dtype=torch.float64)
        for name, b in weights_b.items()
    }
    for name, indices in wanted.items():
        losses[name][list(indices)] = 0.0
    plain_loss = 0.0
    prefix = _Prefix(objective.model, weights_b)
    for batch in objective.batches:
        with prefix.recording() as outputs:
            plain_loss += float(objective.loss_sum(batch))
        for name, indices in wanted.items():
            with prefix.replaying(outputs, until=name):
                for index in indices:
                    with _column(weights_b[name], index, columns[name][:, index]):
                        losses[name][index] += float(objective.loss_sum(batch))
    scale = -1 / objective.num_targets
    return {name: loss * scale for name, loss in losses.items()}, plain_loss * scale


@contextmanager
def _column(b: Tensor, index: int, values: Tensor) -> Iterator[None]:
    """Column `index` of B replaced inside, and its very bits back outside."""
    saved = b[:, index].clone()
    b[:, index] = values
    try:
        yield
    finally:
        b[:, index] = saved


class _Prefix:
    """Skipping the blocks before a module by giving back what they put out before.

    The rest of the model runs as it is, so nothing need be known about its embeddings, masks or
    head. Modules outside the blocks, or a model with several lists of blocks, skip nothing.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, Any]) -> None:
        found = block_list(model, names)
        self._list_name, self._blocks = found if found else ("", nn.ModuleList())

    @contextmanager
    def recording(self) -> Iterator[dict[int, Any]]:
        """Keep what each block puts out, by its index."""
        outputs: dict[int, Any] = {}

        def keep(index: int) -> Any:
            return lambda _module, _args, output: outputs.update({index: output})

        handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(self._blocks)]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, outputs: Mapping[int, Any], *, until: str) -> Iterator[None]:
        """Let no block before the one that holds the module `until` compute."""
        index = (block_index(until, self._list_name) if self._list_name else None) or 0
        skipped = list(self._blocks)[:index]
        own = [vars(block).get("forward") for block in skipped]
        for block in skipped:
            # The block before the module's own is the only one whose output is read.
            block.forward = lambda *_, _output=outputs[index - 1], **__: _output
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
