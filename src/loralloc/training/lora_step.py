"""The LoRA linear as one autograd function: in the activation's dtype, saving what backward needs.

PEFT casts activations to float32 for its float32 A and B and lets autograd keep every intermediate.
Here the weights stay float32 masters, the arithmetic is the activation's, and backward keeps the
input and A x only. The frozen weight gets no gradient.

    forward     h = x A^T          y = x W^T + b + s h B^T
    backward    dh = s dy B        dx = dy W + dh A        dA = dh^T x        dB = s dy^T h
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FusedLoraLinear(Linear):
    """PEFT's `lora.Linear` with a fused training step, made by `fuse`.

    Whatever the fused step does not cover (several or merged adapters, variants such as DoRA,
    dropout, autocast, an adapter switched off) runs PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        if args or kwargs or not self._is_plain(x):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        name = self.active_adapters[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.get_base_layer()
        frozen = type(base) is nn.Linear and not base.weight.requires_grad
        if frozen and (base.bias is None or not base.bias.requires_grad):
            return _apply(_LoraLinear, x, base.weight, base.bias, a, b, self.scaling[name])
        return _apply(_LoraUpdate, x, base(x), a, b, self.scaling[name])

    def _is_plain(self, x: Tensor) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias.get(name)
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
            and not torch.is_autocast_enabled(x.device.type)
        )


def fuse(model: nn.Module) -> int:
    """Give every plain `lora.Linear` of a model the fused step, in place.

    The layers keep their parameters, names and everything else of PEFT's class, of which theirs is
    a subclass.

    Returns:
        How many layers were changed.
    """
    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)


def _apply(function: Any, *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with a frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        h = flat @ a.to(x.dtype).t()  # (tokens, rank)
        y = F.linear(flat, w, bias).addmm_(h, b.to(x.dtype).t(), alpha=s)
        ctx.save_for_backward(flat, h, w, a, b)
        ctx.s, ctx.shape = s, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])  # (tokens, out)
        dh, da, db = _update_gradients(ctx.s, x, h, a, b, dy, ctx.needs_input_grad[3:5])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ w).addmm_(dh, a.to(dy.dtype)).view(ctx.shape)
        return dx, None, None, da, db, None


class _LoraUpdate(torch.autograd.Function):
    """y = base + s (x A^T) B^T, for base layers with arithmetic of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ a.to(x.dtype).t()
        y = torch.addmm(
            base.reshape(-1, base.shape[-1]), h.to(base.dtype), b.to(base.dtype).t(), alpha=s
        )
        ctx.save_for_backward(flat, h, a, b)
        ctx.s, ctx.shape = s, x.shape
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        dh, da, db = _update_gradients(ctx.s, x, h, a, b, flat, ctx.needs_input_grad[2:4])
        dx = (dh @ a.to(dh.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, dy, da, db, None


def _update_gradients(
    s: float, x: Tensor, h: Tensor, a: Tensor, b: Tensor, dy: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients dh, of shape (tokens, rank), and dA and dB in the master weights' dtype."""
    dh = (dy @ b.to(dy.dtype)).mul_(s)
    da = (dh.t() @ x).to(a.dtype) if needed[0] else None
    db = (dy.t() @ h).to(b.dtype).mul_(s) if needed[1] else None
    return dh, da, db
