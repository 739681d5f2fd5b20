"""Which of PEFT's layers the fused step covers, and what it reads of them.

Whatever multiplies ranks is put into A or B for the step, where it is small: a gate g into B, and
AdaLoRA's singular values E, with the number that PEFT divides by, into Q, which is its A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

EPSILON = 1e-5
"""What PEFT adds to AdaLoRA's number of ranks before it divides by it."""


class RankGate:
    """A forward hook on A that multiplies every rank by a gate: y = W x + s B (g * (A x)).

    Where the layer is fused the hook is not called: B diag(g) takes the place of B, so that a gated
    layer costs what a plain one does, and gradients reach the gate through it.

    Args:
        gate: Gives the gates of the moment, shape (num_ranks,), in every forward pass.
    """

    def __init__(self, gate: Callable[[], Tensor]) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, inputs: object, hidden: Tensor) -> Tensor:
        """A x, shape (..., num_ranks), times the gates."""
        return hidden * self.gate().to(hidden)


def is_linear_of_peft(cls: type) -> bool:
    """Whether a layer's forward is W x + s B (A x), or AdaLoRA's W x + s P (E * (Q x)).

    The quantised ones of LoRA are told by name.

    Their module cannot be imported where bitsandbytes is missing.
    """
    quantised = ("Linear4bit", "Linear8bitLt")
    return cls in (Linear, SVDLinear) or (
        cls.__module__ == "peft.tuners.lora.bnb" and cls.__name__ in quantised
    )


def is_whole(layer: LoraLayer) -> bool:
    """Whether all of the layer, its frozen linear too, is one fused function."""
    return is_plain(layer) and has_frozen_linear(layer)


def is_plain(layer: LoraLayer) -> bool:
    """Whether the layer is its base layer and s B (A x), and nothing else."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias.get(name)
        and not _is_hooked(layer.lora_A[name], besides=RankGate)
        and not _is_hooked(layer.lora_B[name])
        and (isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training)
        and not torch.compiler.is_compiling()
    )


def has_frozen_linear(layer: LoraLayer) -> bool:
    """Whether the base layer is an ordinary linear layer that does not train."""
    base: Any = layer.base_layer  # not get_base_layer(), which looks through other adapters
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not _is_hooked(base)
    )


def _is_hooked(module: nn.Module | Tensor, *, besides: type | tuple[()] = ()) -> bool:
    """Whether anything acts on a call of the module from outside, hooks of one class apart.

    AdaLoRA's A and B are parameters, which nobody calls.
    """
    return isinstance(module, nn.Module) and bool(
        any(not isinstance(hook, besides) for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def adapter_of(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
    """A, B and s of the adapter that is active, its gates and singular values among them."""
    name = layer.active_adapters[0]
    if isinstance(layer, SVDLinear):  # PEFT divides what it puts out, element by element
        e = layer.lora_E[name] / (layer.ranknum[name] + EPSILON)
        return layer.lora_A[name] * e, layer.lora_B[name], layer.scaling[name]
    a, b = layer.lora_A[name], layer.lora_B[name].weight
    for hook in a._forward_hooks.values():
        b = b * hook.gate().to(b)
    return a.weight, b, layer.scaling[name]
