"""Attention over short sequences on a CPU in bfloat16, as a few batched matrix products.

PyTorch's own kernel for CPUs takes longer over the backward pass of a short sequence than over all
linear layers of the block. Up to `LONGEST` keys the scores are small enough to be written out;
beyond, on other devices and in float32, PyTorch's kernel runs. The dtype is the one that the
arithmetic has, under autocast its own. Probabilities are computed anew in backward, so no more is
kept than PyTorch's kernel keeps.

    forward     P = softmax(scale Q K^T)        O = P V
    backward    dV = P^T dO        dS = P * (dP - rowsum(P * dP)),  dP = dO V^T
                dQ = scale dS K    dK = scale dS^T Q
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loralloc.kernels.products import autocast_dtype, without_autocast

NAME = "loralloc_short"
"""The name under which Transformers knows this attention."""

LONGEST = 192
"""Keys up to which writing the scores out was faster on a CPU with bfloat16 arithmetic."""


HALF = (torch.bfloat16, torch.float16)
"""What PyTorch's kernel is slow in."""


def use_short_attention(model: Any) -> bool:
    """Let a model attend to short sequences in this way, where that is faster.

    Each call shows whether it is: the dtype of the arithmetic is not known before.

    Returns:
        Whether anything was changed: the model must be on a CPU and use PyTorch's attention.
    """
    if next(model.parameters()).device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    if not model._can_set_attn_implementation():
        return False  # it calls PyTorch's attention by itself
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it, (batch, heads, length, dim) to (batch, length, ...)."""
    length, num_keys = query.shape[2], key.shape[2]
    dtype = autocast_dtype(query) or query.dtype
    is_covered = (
        length > 1
        and num_keys <= LONGEST
        and query.device.type == "cpu"
        and dtype in HALF
        and len(query) == len(key)
        and dropout == 0
        and position_bias is None
        and kwargs.get("cache") is None
        and kwargs.get("softcap") is None
        and (attention_mask is None or attention_mask.dtype == torch.bool)
    )
    if not is_covered:
        return cast(
            "tuple[Tensor, None]",
            sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **kwargs,
            ),
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = query.new_ones(length, num_keys, dtype=torch.bool).tril()[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    attended = short_attention(query, key, value, attention_mask, scale)
    return attended.transpose(1, 2).contiguous(), None


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale Q K^T) V with the scores written out.

    Args:
        query: Shape (batch, heads, length, dim).
        key: Shape (batch, groups, keys, dim); each group of heads shares one.
        value: Shape (batch, groups, keys, value_dim).
        mask: True where a query sees a key, shape (batch or 1, 1 or heads, length, keys).
        scale: What the scores are multiplied by.

    Returns:
        Shape (batch, heads, length, value_dim).
    """
    attended: Any = _ShortAttention
    return cast(Tensor, attended.apply(query, key, value, mask, scale))


class _ShortAttention(torch.autograd.Function):
    """Heads that share keys are stacked along the length: no key is ever repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        groups = key.shape[0] * key.shape[1]
        q = query.reshape(groups, -1, query.shape[-1])  # (groups, heads / groups * length, dim)
        k, v = (t.reshape(groups, *t.shape[2:]) for t in (key, value))
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        with without_autocast(q):
            p = _probabilities(q, k, mask, scale, query.shape)
            return torch.bmm(p.to(v.dtype), v).view(*query.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        grad = grad.reshape(len(q), q.shape[1], -1)
        with without_autocast(q):
            p = _probabilities(q, k, mask, ctx.scale, ctx.shapes[0])
            dv = torch.bmm(p.to(v.dtype).transpose(1, 2), grad)
            dp = torch.bmm(grad, v.transpose(1, 2)).float()
            ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale).to(q.dtype)
            dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        return *(t.view(s) for t, s in zip((dq, dk, dv), ctx.shapes, strict=True)), None, None


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, query_shape: torch.Size
) -> Tensor:
    """Softmax of the scores in float32, shape (groups, heads / groups * length, keys)."""
    # In float32, as in PyTorch's kernel: a score rounded to bfloat16 is off by up to 0.4%.
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if mask is not None:
        # The lowest number, not minus infinity: a padded query sees nothing, and must not be NaN.
        lowest = torch.finfo(scores.dtype).min
        scores.view(*query_shape[:3], k.shape[1]).masked_fill_(~mask, lowest)
    return scores.softmax(-1)
