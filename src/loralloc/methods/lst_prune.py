"""What a side network begins as: the part of the backbone whose weights are largest.

A channel of the residual stream means the same in every block, so one set of channels is kept
throughout; heads and feed-forward channels are chosen block by block. Importance is the sum of |w|.
Of a head that is kept, every n-th pair of channels is: rotary embeddings turn those about as fast as
the pairs of the narrow head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralloc.methods.blocks import blocks, hidden_size
from loralloc.methods.lst_ladder import Ladder, final_norm
from loralloc.methods.lst_narrow import head_width

AXES = {
    **dict.fromkeys(("self_attn.q_proj", "attention.self.query"), ("query", "stream")),
    **dict.fromkeys(("self_attn.k_proj", "attention.self.key"), ("key", "stream")),
    **dict.fromkeys(("self_attn.v_proj", "attention.self.value"), ("key", "stream")),
    "attn.c_attn": ("fused", "stream"),
    **dict.fromkeys(
        ("self_attn.o_proj", "attn.c_proj", "attention.output.dense"), ("stream", "query")
    ),
    **dict.fromkeys(
        ("mlp.gate_proj", "mlp.up_proj", "mlp.c_fc", "intermediate.dense"), ("inner", "stream")
    ),
    **dict.fromkeys(("mlp.down_proj", "mlp.c_proj", "output.dense"), ("stream", "inner")),
}
"""What the output and the input channels of a block's linear layers are."""


@torch.no_grad()
def prune_into(ladder: Ladder, model: Any) -> None:
    """Let a ladder begin as a part of the backbone.

    The steps down take the kept channels out of the backbone's stream, the step up puts them back.

    Raises:
        TypeError: The backbone's blocks are not of a shape that is known.
    """
    wide, heads = blocks(model), ladder.config.num_attention_heads
    width = ladder.config.hidden_size
    stream = _largest(torch.stack([_magnitude(block, "stream") for block in wide]).sum(0), width)
    for index, side in zip(ladder.beside, ladder.blocks, strict=True):
        block = wide[index]
        kept = {
            "stream": stream,
            "inner": _largest(_magnitude(block, "inner"), len(_magnitude(side, "inner"))),
            **_kept_of_heads(block, model.config, heads, width // heads),
        }
        _copy(block, side, kept)
    if ladder.norm is not None:
        _copy(final_norm(model), ladder.norm, {"stream": stream})
    selection = torch.eye(hidden_size(model))[stream.cpu()]  # (width, hidden)
    for down in ladder.downs:
        down.weight.copy_(selection)
        down.bias.zero_()
    ladder.up.weight.copy_(selection.T)
    ladder.up.bias.zero_()


def _kept_of_heads(block: nn.Module, config: Any, heads: int, width: int) -> dict[str, Tensor]:
    """Channels of queries, and of the keys and values that those heads see."""
    every, wide = config.num_attention_heads, head_width(config)
    groups = getattr(config, "num_key_value_heads", None) or every
    chosen = _largest(_magnitude(block, "query").view(every, wide).sum(1), heads)
    pairs = torch.arange(width // 2, device=chosen.device) * (wide // 2) // (width // 2)
    within = torch.cat([pairs, pairs + wide // 2])
    query, key = (
        (head[:, None] * wide + within).flatten() for head in (chosen, chosen // (every // groups))
    )
    fused = torch.cat([query + part * every * wide for part in range(3)])
    return {"query": query, "key": key, "fused": fused}


def _magnitude(block: nn.Module, role: str) -> Tensor:
    """Sum of |w| by channel, over the block's matrices that have such channels."""
    sums = [
        weight.abs().float().sum(1 - axis)
        for _, weight, roles in _parameters(block)
        for axis, found in enumerate(roles)
        if found == role and weight.ndim == 2
    ]
    return torch.stack(sums).sum(0)


def _parameters(block: nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Every parameter of a block by name, with what its axes are."""
    for name, weight in block.named_parameters():
        module = name.rpartition(".")[0]
        roles = AXES.get(module, ("stream",))[: weight.ndim]  # a norm has the stream's channels
        is_transposed = isinstance(block.get_submodule(module), Conv1D) and weight.ndim == 2
        yield name, weight, tuple(reversed(roles)) if is_transposed else roles


def _copy(wide: nn.Module, narrow: nn.Module, kept: Mapping[str, Tensor]) -> None:
    for name, weight, roles in _parameters(wide):
        for axis, role in enumerate(roles):
            weight = weight.index_select(axis, kept[role])
        narrow.get_parameter(name).copy_(weight)


def _largest(values: Tensor, number: int) -> Tensor:
    """Indices of the largest, in ascending order."""
    return values.topk(number).indices.sort().values
