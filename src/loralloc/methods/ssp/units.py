"""The units that SSP chooses among: LoRA, added biases, layer norms' weights and adapters.

A unit is one such change of one module's output: it is 0 at the start, and is kept or dropped as
a whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralloc.allocation.blocks import backbone, hidden_size, sublayers
from loralloc.methods.bottleneck import Bottleneck
from loralloc.methods.peft_method import targeted_shapes


class Unit(nn.Module):
    """What one unit adds to a module's output, times its gate while a structure is searched."""

    sampled: Tensor | None = None
    """The gate in training, a number; None: 1."""

    expected: Tensor | None = None
    """The gate in evaluation."""

    def gated(self, values: Tensor) -> Tensor:
        """The values times the gate of the mode that the unit is in."""
        gate = self.sampled if self.training else self.expected
        return values if gate is None else values * gate


class LoraUnit(Unit):
    """s B (z A x): the gate acts where the tensors are smallest."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, written: Tensor, read: Tensor) -> Tensor:
        """The output with the unit's part: (..., out_features) from (..., in_features)."""
        inner = self.gated(functional.linear(read, self.a.to(read.dtype)) * self.scale)
        return written + functional.linear(inner, self.b.to(read.dtype))


class BiasUnit(Unit):
    """A bias added to a linear layer's own."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(out_features))

    def forward(self, written: Tensor, read: Tensor) -> Tensor:
        """The output with the unit's part, shape (..., out_features)."""
        return written + self.gated(self.shift).to(written.dtype)


class NormUnit(Unit):
    """An offset to a layer norm's weight: what is normalised, times the offset."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(norm.weight.shape))
        is_centred = isinstance(norm, nn.LayerNorm)
        self.normalise = functional.layer_norm if is_centred else functional.rms_norm
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, written: Tensor, read: Tensor) -> Tensor:
        """The output with the unit's part, of the shape that was read."""
        normal = self.normalise(read, self.offset.shape, eps=self.eps)
        return written + normal * self.gated(self.offset).to(read.dtype)


class AdapterUnit(Unit):
    """A bottleneck adapter on what a sublayer writes."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.adapter = Bottleneck(width, bottleneck, activation="gelu")

    def forward(self, written: Tensor, *_: Tensor) -> Tensor:
        """The output with the unit's part, shape (..., width)."""
        return written + self.gated(self.adapter(written))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A unit of the search space, before it is built."""

    name: str
    """The unit's name in the model: that of the module that holds it, and its kind."""

    host: nn.Module
    """The module whose output it changes."""

    size: int
    """Its parameters."""

    build: Callable[[], Unit]
    """Makes it, with weights drawn anew."""

    def act(self, unit: Unit) -> Any:
        """Let a unit change the host's output, until the handle is removed."""
        # A partial rather than a closure: a copy of the model has hooks that call copied units.
        return self.host.register_forward_hook(functools.partial(_change, unit))


def _change(unit: Unit, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # attention gives its probabilities as well
        return (unit(output[0], *args), *output[1:])
    return unit(output, *args)


def search_space(
    model: Any, *, rank: int, max_parameters: int, scale: float, targets: Sequence[str] | str
) -> list[Candidate]:
    """LoRA, BitFit and LNFit everywhere, and adapters that make it twice what may be kept.

    Args:
        model: The backbone, with its head; it may be on "meta".
        rank: Ranks of every LoRA unit.
        max_parameters: What may be kept.
        scale: s of the LoRA units.
        targets: The linear layers, as PEFT names them.
    """
    found: list[Candidate] = []
    linears = {
        name: (model.get_submodule(name), shape)
        for name, shape in targeted_shapes(model, targets).items()
    }
    for name, (host, (inward, outward)) in linears.items():
        build: Callable[[], Unit] = functools.partial(
            LoraUnit, inward, outward, rank=rank, scale=scale
        )
        size = rank * (inward + outward)
        found.append(Candidate(name=f"{name}.ssp_lora", host=host, size=size, build=build))
    for name, (host, (_, outward)) in linears.items():
        build = functools.partial(BiasUnit, outward)
        found.append(Candidate(name=f"{name}.ssp_bias", host=host, size=outward, build=build))
    names = {module: name for name, module in model.named_modules()}
    for norm in filter(_is_norm, backbone(model).modules()):
        build = functools.partial(NormUnit, norm)
        size = norm.weight.numel()
        found.append(Candidate(name=f"{names[norm]}.ssp_norm", host=norm, size=size, build=build))
    # Last: where an adapter's host is a linear layer, the adapter reads what its units have added.
    width, parts = hidden_size(model), sublayers(model)
    rest = 2 * max_parameters - sum(candidate.size for candidate in found)
    bottleneck = max(1, round(rest / (len(parts) * 2 * width)))
    for part in parts:
        build, size = functools.partial(AdapterUnit, width, bottleneck), 2 * width * bottleneck
        name = f"{names[part.owner]}.ssp_adapter"
        found.append(Candidate(name=name, host=part.writes, size=size, build=build))
    return found


def _is_norm(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    return is_norm and getattr(module, "weight", None) is not None
