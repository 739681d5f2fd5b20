"""Bottleneck adapters, and the two places where a module can act in a sublayer.

For a sublayer y = F(x), before its residual sum:

    sequential    y + Ad(y)         parallel    y + Ad(x)         Ad(z) = s W_up act(W_down z)
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from loralloc.allocation.blocks import Sublayer, hidden_size, sublayers
from loralloc.methods.in_place import InPlaceMethod

ADAPTER = "adapter"
"""The name under which a sublayer holds its adapter."""

Change = Callable[[Tensor], Tensor | None]
"""What is added to a sublayer's output, given what is read; None where nothing is."""


class Bottleneck(nn.Module):
    """s W_up act(W_down z), which is 0 at the start: W_up and the biases are.

    Weights are float32, and computed with in the type of what is read.

    Args:
        width: Size d of what is read and written.
        bottleneck: Size b between the two products.
        activation: As Transformers names it ("relu", "gelu", "silu", ...).
        bias: Whether both products have one.
        scale: s.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: str = "relu",
        bias: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation: nn.Module = ACT2FN[activation]
        self.scale = scale
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, z: Tensor) -> Tensor:
        """What is added to the sublayer's output, of the same shape as z: (..., width)."""
        inner = self.activation(_linear(z, self.down, self.down_bias))
        added = _linear(inner, self.up, self.up_bias)
        return added if self.scale == 1 else self.scale * added


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def act_sequentially(sublayer: Sublayer, change: Change) -> None:
    """Add to a sublayer's output y what is computed from y: y + change(y)."""
    # Partials rather than closures: a copy of the model has hooks that call the copied modules.
    sublayer.writes.register_forward_hook(functools.partial(_add_to_output, change))


def act_in_parallel(sublayer: Sublayer, change: Change) -> None:
    """Add to a sublayer's output y what is computed from its input x: y + change(x)."""
    read: list[Tensor] = []
    sublayer.reads.register_forward_pre_hook(functools.partial(_keep, read), with_kwargs=True)
    sublayer.writes.register_forward_hook(functools.partial(_add_from_input, change, read))


def _add_to_output(change: Change, module: nn.Module, args: Any, output: Any) -> Any:
    return _plus(output, change(_written(output)))


def _keep(read: list[Tensor], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    read[:] = [args[0] if args else kwargs["hidden_states"]]


def _add_from_input(
    change: Change, read: list[Tensor], module: nn.Module, args: Any, output: Any
) -> Any:
    return _plus(output, change(read.pop()))


def _written(output: Any) -> Tensor:
    """Attention gives its probabilities as well."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _plus(output: Any, added: Tensor | None) -> Any:
    if added is None:
        return output
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


@dataclass(kw_only=True)
class BottleneckMethod(InPlaceMethod):
    """A method that puts one bottleneck into every attention and every feed-forward layer."""

    bottleneck: int | None = None
    """Size between the two products; None for what the budget allows."""

    activation: str = "relu"
    """As Transformers names it: "relu", "gelu", "silu" and others."""

    bias: bool = False
    """Whether the adapters have biases; the counts of the paper's tables are without."""

    size: ClassVar[str] = "bottleneck"

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        width = hidden_size(model)
        one = 2 * width * size + (width + size) * self.bias
        return len(sublayers(model)) * one

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        assert self.bottleneck is not None, "fit() chooses it"
        for sublayer in sublayers(model):
            adapter = Bottleneck(
                hidden_size(model), self.bottleneck, activation=self.activation, bias=self.bias
            )
            adapter.to(next(sublayer.owner.parameters()).device)
            sublayer.owner.add_module(ADAPTER, adapter)
            self.place(sublayer, adapter)

    @abstractmethod
    def place(self, sublayer: Sublayer, adapter: Bottleneck) -> None:
        """Draw the adapter's weights, where they are to be others, and let it act."""
