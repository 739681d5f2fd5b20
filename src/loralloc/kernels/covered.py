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
    """Whether the layer is its base layer and s B (A x), and nothing else.

    Asked of every layer in every pass, so submodules are looked up as modules keep them:
    `nn.Module.__getattr__` would take longer than the rest together.
    """
    if layer.disable_adapters or layer.merged or torch.compiler.is_compiling():
        return False
    names = layer.active_adapters
    if len(names) != 1:
        return False
    (name,), parts = names, layer._modules
    a: Any = parts["lora_A"]
    b: Any = parts["lora_B"]
    return (
        name in a
        and name not in layer.lora_variant
        and not layer.lora_bias.get(name)
        and not _is_hooked(a[name], besides=RankGate)
        and not _is_hooked(b[name])
        and (not layer.training or isinstance(_in(parts["lora_dropout"], name), nn.Identity))
    )


def has_frozen_linear(layer: LoraLayer) -> bool:
    """Whether the base layer is an ordinary linear layer that does not train."""
    base: Any = layer._modules["base_layer"]  # not what other adapters hide
    if type(base) is not nn.Linear:
        return False
    weight, bias = base._parameters.get("weight"), base._parameters["bias"]
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not _is_hooked(base)
    )


def _is_hooked(module: nn.Module | Tensor, *, besides: type | None = None) -> bool:
    """Whether anything acts on a call of the module from outside, hooks of one class apart.

    AdaLoRA's A and B are parameters, which nobody calls.
    """
    if not isinstance(module, nn.Module):
        return False
    if module._forward_hooks and (
        besides is None or any(not isinstance(hook, besides) for hook in _hooks(module))
    ):
        return True
    return bool(
        module._forward_pre_hooks
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
    parts = layer._modules
    a, b = _in(parts["lora_A"], name), _in(parts["lora_B"], name)._parameters["weight"]
    assert b is not None, "B is linear"
    if a._forward_hooks:
        for hook in _hooks(a):
            b = b * hook.gate().to(b)
    return a._parameters["weight"], b, layer.scaling[name]


def _in(modules: Any, name: str) -> Any:
    """One of a dictionary of modules."""
    return modules._modules[name]


def _hooks(module: nn.Module) -> Any:
    return module._forward_hooks.values()
