"""Eq. 6 exactly: switch every rank off, and on alone, and measure.

A gate of block l leaves every hidden state before block l as it is. So each block's output is
kept once for the full model and once for the base model, and every ablation starts at its own
block: half the work of whole forward passes. Ablations of one block share a forward pass, each
with a copy of the micro-batch to itself: in copy k, the layer of rank r puts out what a change of
column r of B adds, dy = s (x A_r^T) dB_r^T.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from loralloc.allocation.importance.copies import count_examples, num_copies, repeated
from loralloc.allocation.importance.path import gates_at
from loralloc.allocation.importance.prefix import Prefix
from loralloc.allocation.layers import base_model
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
        off = {name: -weights_b[name] for name in wanted}
        s_off, s_full = _sweep(objective, weights_b, wanted, changes=off)
        with gates_at(weights_b, 0) as on:
            s_on, s_base = _sweep(objective, weights_b, wanted, changes=on)
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
    changes: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """S with one column of B changed, for each wanted rank; and S as it stands."""
    losses = {
        name: torch.full((b.shape[1],), torch.nan, dtype=torch.float64)
        for name, b in weights_b.items()
    }
    for name, indices in wanted.items():
        losses[name][list(indices)] = 0.0
    plain_loss = 0.0
    layers = {name: _layer(objective.model, name) for name in wanted}
    prefix = Prefix(objective.model, weights_b)
    for batch in objective.batches:
        with prefix.recording() as outputs, _shapes(layers) as shapes:
            plain = objective.losses(batch)
        plain_loss += float(plain.sum())
        size = count_examples(batch)
        groups = defaultdict(list)
        for name, indices in wanted.items():
            block = prefix.block(name)
            most = 1
            if block is not None and plain.ndim:
                most = num_copies(
                    batch,
                    shapes.get(name),
                    device=objective.device.type,
                    num_blocks=len(prefix),
                )
            groups[block or 0, most] += [(name, index) for index in indices]
        for (block, most), ranks in groups.items():
            for first in range(0, len(ranks), most):
                some = ranks[first : first + most]
                output = repeated(outputs.get(block - 1), size, len(some))
                with prefix.replaying(output, before=block), ExitStack() as hooks:
                    for copy, (name, index) in enumerate(some):
                        add = _adds(
                            *_rank_one(layers[name], weights_b[name], index, changes[name]),
                            copy,
                            len(some),
                        )
                        hooks.callback(layers[name].register_forward_hook(add).remove)
                    inputs = {k: repeated(v, size, len(some)) for k, v in batch.items()}
                    found = objective.losses(inputs).view(len(some), -1).sum(1).tolist()
                for (name, index), loss in zip(some, found, strict=True):
                    losses[name][index] += loss
    scale = -1 / objective.num_targets
    return {name: loss * scale for name, loss in losses.items()}, plain_loss * scale


def _layer(model, name):
    return base_model(model).get_submodule(name)


@contextmanager
def _shapes(layers):
    shapes = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _layer, args, name=name: shapes.update({name: args[0].shape})
        )
        for name, layer in layers.items()
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _rank_one(layer, b, index, change):
    adapter = next(key for key, other in layer.lora_B.items() if other.weight is b)
    a = layer.lora_A[adapter].weight[index] * layer.scaling[adapter]
    return a, change[:, index]


def _adds(a, b, copy, num):
    def add(_layer, args, output):
        size = len(output) // num
        rows = slice(copy * size, (copy + 1) * size)
        output[rows] += (args[0][rows].to(a.dtype) @ a)[..., None] * b

    return add
