"""What a side network begins as: the part of the backbone whose weights are largest.

A channel of the residual stream means the same in every block, so one set of channels is kept
throughout; heads and feed-forward channels are chosen block by block, by the sum of |w|. Of a head
that is kept, pairs of channels are kept at even distances: rotary embeddings turn those about as
fast as the pairs of the narrow head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralloc.allocation.blocks import blocks, hidden_size
from loralloc.methods.lst.ladder import Ladder, final_norm
from loralloc.methods.lst.narrow import head_width

AXES = {
    **dict.fromkeys(("self_attn.q_proj", "attention.self.query"), ("query", "stream")),
    **dict.fromkeys(("self_attn.k_proj", "attention.self.key"), ("key", "stream")),
    **dict.fromkeys(("self_attn.v_proj", "attention.self.value"), ("key", "stream")),
    **dict.fromkeys(("attn.c_attn",), ("query key value", "stream")),
    **dict.fromkeys(("self_attn.o_proj", "attn.c_proj"), ("stream", "query")),
    **dict.fromkeys(("attention.output.dense",), ("stream", "query")),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.c_fc"), ("inner", "stream")),
    **dict.fromkeys(("intermediate.dense",), ("inner", "stream")),
    **dict.fromkeys(("mlp.down_proj", "mlp.c_proj", "output.dense"), ("stream", "inner")),
}
"""Of which kind the output and the input channels of a block's linear layers are."""


@torch.no_grad()
def prune_into(ladder: Ladder, model: Any) -> None:
    """Let a ladder begin as a part of the backbone.

    The steps down take the kept channels out of the backbone's stream, the step up puts them back.

    Raises:
        TypeError: The backbone's blocks have parts that are not known.
    """
    wide, config = blocks(model), ladder.config
    _check(wide[0], hidden_size(model))
    magnitudes = torch.stack([_magnitude(block, "stream") for block in wide])
    stream = _largest(magnitudes.sum(0), config.hidden_size)
    for index, side in zip(ladder.beside, ladder.blocks, strict=True):
        inner = _largest(_magnitude(wide[index], "inner"), len(_magnitude(side, "inner")))
        heads = _kept_of_heads(wide[index], model.config, config)
        _copy(wide[index], side, {"stream": stream, "inner": inner, **heads})
    norm = final_norm(model)
    if norm is not None:
        _copy(norm, ladder.norm, {"stream": stream})
    selection = torch.eye(hidden_size(model), device=stream.device)[stream]  # (width, hidden)
    steps: list[Any] = [*ladder.downs, ladder.up]
    for step in steps:
        step.weight.copy_(selection.T if step is ladder.up else selection)
        step.bias.zero_()


def _kept_of_heads(block: nn.Module, config: Any, narrow: Any) -> dict[str, Tensor]:
    """Channels of queries, and those of the keys and values that they see."""
    every, wide = config.num_attention_heads, head_width(config)
    per_group = every // (getattr(config, "num_key_value_heads", None) or every)
    heads = _largest(
        _magnitude(block, "query").view(every, wide).sum(1), narrow.num_attention_heads
    )
    number = narrow.hidden_size // len(heads) // 2
    pairs = torch.arange(number, device=heads.device) * (wide // 2) // number
    within = torch.cat([pairs, pairs + wide // 2])  # both halves of a head, as Llama turns them
    query = (heads[:, None] * wide + within).flatten()
    key = ((heads // per_group)[:, None] * wide + within).flatten()
    fused = torch.cat([query + part * every * wide for part in range(3)])
    return {"query": query, "key": key, "query key value": fused}


def _magnitude(block: nn.Module, kind: str) -> Tensor:
    """Sum of |w| by channel, over a block's matrices that have channels of a kind."""
    sums = [
        weight.abs().float().sum(1 - axis)
        for _, weight, kinds in _parameters(block)
        for axis, found in enumerate(kinds)
        if found == kind and weight.ndim == 2
    ]
    return torch.stack(sums).sum(0)


def _largest(values: Tensor, number: int) -> Tensor:
    """Indices of the largest values, in ascending order."""
    return values.topk(number).indices.sort().values


def _copy(wide: nn.Module, narrow: Any, kept: Mapping[str, Tensor]) -> None:
    for name, weight, kinds in _parameters(wide):
        for axis, kind in enumerate(kinds):
            weight = weight.index_select(axis, kept[kind])
        narrow.get_parameter(name).copy_(weight)


def _parameters(block: nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Every parameter by name, and of which kinds its axes are."""
    for name, weight in block.named_parameters():
        module = name.rpartition(".")[0]
        kinds = AXES.get(module, ("stream",))[: weight.ndim]  # norms are over the stream
        is_transposed = isinstance(block.get_submodule(module), Conv1D)
        yield name, weight, kinds[::-1] if is_transposed else kinds


def _check(block: nn.Module, hidden: int) -> None:
    for name, weight in block.named_parameters():
        if name.rpartition(".")[0] not in AXES and weight.shape != (hidden,):
            raise TypeError(
                f"A {type(block).__name__} has a part that is not known ({name}), so a side "
                "network cannot begin as the largest of its weights; use `init` of 'random'."
            )
