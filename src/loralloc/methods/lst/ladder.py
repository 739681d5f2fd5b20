"""A narrow network beside the backbone, which reads the output of every block.

    s = Down_0(embeddings)
    s = SideBlock_i(mu_i s + (1 - mu_i) Down_i(h_i)),  mu_i = sigmoid(a_i / 0.1)   for every block i
    h = Up(norm(s)), which takes the place of the backbone's last hidden state

The backbone's blocks are called as ever, and hooks catch what they put out. Side blocks are of the
backbone's own class, so masks, positions and caches are those that its blocks were called with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import Cache, DynamicCache

from loralloc.allocation.blocks import backbone, blocks, hidden_size
from loralloc.methods.lst.narrow import side_config

LADDER = "ladder"
"""The name under which a model holds its ladder."""

TEMPERATURE = 0.1
"""What a gate is divided by before the sigmoid."""


class Rung(NamedTuple):
    """What one side block reads."""

    down: Tensor
    """Down_i(h_i), shape (batch, length, width)."""

    args: tuple[Any, ...]
    """What the backbone's block was called with, besides its hidden states."""

    kwargs: Mapping[str, Any]


class Ladder(nn.Module):
    """The side network. Weights are float32, and computed with in the backbone's type.

    Args:
        model: The backbone with its head; it may be on "meta".
        width: Of the side blocks, one of `side_widths`.
        beside: Indices of the blocks that have a side block, in ascending order.
        inner: Channels of the side blocks' feed-forward layers; as narrow as `width` by default.
    """

    def __init__(
        self, model: Any, *, width: int, beside: Sequence[int], inner: int | None = None
    ) -> None:
        super().__init__()
        wide, hidden = blocks(model), hidden_size(model)
        self.beside = list(beside)
        self.config = side_config(model.config, width, beside=beside, inner=inner)
        self._wide_config = model.config
        self.downs = nn.ModuleList(nn.Linear(hidden, width) for _ in range(len(beside) + 1))
        self.gates = nn.Parameter(torch.zeros(len(beside)))
        self.blocks = nn.ModuleList(
            type(wide[0])(self.config, layer_idx=len(wide) + number)
            for number in range(len(beside))
        )
        rotary = getattr(backbone(model), "rotary_emb", None)
        self.rotary = None if rotary is None else type(rotary)(config=self.config)
        norm: Any = final_norm(model)
        self.norm = None if norm is None else type(norm)(width, eps=_epsilon(norm))
        self.up = nn.Linear(width, hidden)
        self._bottom: Tensor | None = None
        self._rungs: list[Rung] = []

    def attach(self, model: Any) -> None:
        """Put the side network's output in the place of the backbone's last hidden state."""
        # Beside the backbone, not inside: its blocks are counted by their class where hidden
        # states are asked for.
        model.add_module(LADDER, self)
        wide = blocks(model)
        wide[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        # Partials rather than closures: a copy of the model has hooks that call the copied modules.
        for index, down in zip(self.beside, list(self.downs)[1:], strict=True):
            catch = functools.partial(self._catch, down)
            wide[index].register_forward_hook(catch, with_kwargs=True)
        (final_norm(model) or wide[-1]).register_forward_hook(self._leave)

    def forward(self, s: Tensor, rungs: Sequence[Rung]) -> Tensor:
        """Climb from Down_0(embeddings), shape (batch, length, width), to (..., hidden)."""
        mixing = torch.sigmoid(self.gates / TEMPERATURE).to(s.dtype)
        turned: dict[str, Any] = {}
        if self.rotary is not None:
            positions = rungs[0].kwargs["position_ids"]
            turned["position_embeddings"] = self.rotary(s, position_ids=positions)
        for mu, block, rung in zip(mixing, self.blocks, rungs, strict=True):
            s = mu * s + (1 - mu) * rung.down
            s = _hidden(block(s, *rung.args, **{**rung.kwargs, **turned}))
        last: Tensor = self.up(s if self.norm is None else self.norm(s))
        return last

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the first block."""
        self.config._attn_implementation = self._wide_config._attn_implementation
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                self._make_room(value)
        # No graph can begin below, whatever has asked the embeddings for gradients.
        embeddings = args[0].detach()
        self._bottom, self._rungs = _down(self.downs[0], embeddings), []
        return (embeddings, *args[1:]), kwargs

    def _catch(self, down: nn.Module, block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """After a block that has a side block."""
        self._rungs.append(Rung(_down(down, _hidden(out)), args[1:], kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the backbone's last norm, or its last block where it has none."""
        bottom, rungs = self._bottom, self._rungs
        assert bottom is not None, "the first block ran before"
        self._bottom, self._rungs = None, []
        weights = {
            name: weight.to(bottom.dtype)
            for name, weight in self.named_parameters()
            if not name.startswith(("downs.", "gates"))
        }
        climbed = functional_call(self, weights, (bottom, rungs))
        return (climbed, *output[1:]) if isinstance(output, tuple) else climbed

    def _make_room(self, cache: Cache) -> None:
        """Let a cache hold the side blocks' keys and values after the backbone's."""
        num_blocks = self._wide_config.num_hidden_layers
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"The cache is a {type(cache).__name__}, which cannot be given room for the side "
                'blocks of lst; generate with `cache_implementation="dynamic"`.'
            )
        if len(cache) <= num_blocks and cache.get_seq_length():
            raise ValueError(
                "The cache was filled by the backbone alone, so it lacks the side blocks of lst; "
                "read the prompt with the adapted model."
            )
        # As Transformers makes them: a sliding window beside a block that has one.
        cache.layers.extend(DynamicCache(config=self.config).layers[len(cache) :])


def final_norm(model: Any) -> nn.Module | None:
    """The norm after the last block; BERT's blocks end in their own."""
    inner = backbone(model)
    found: nn.Module | None = getattr(inner, "norm", None) or getattr(inner, "ln_f", None)
    return found


def _epsilon(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _down(down: Any, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, down.weight.to(hidden.dtype), down.bias.to(hidden.dtype))


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
