"""K low-rank updates at once, each on its own block of a batch's rows.

Rows lie in K blocks of n tokens, and block k goes through adapter k. With A and B padded by zeros
to the largest rank R of the K, which change no sum, an update is two batched products:

    forward     H = X (sA)^T            Y = base + H B^T              X (K, n, in), A (K, R, in)
    backward    dH = dY B               dX = dH (sA)                  H (K, n, R), B (K, out, R)
                dA = s dH^T X           dB = dY^T H

The frozen linear is no part of this: it is one product for all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralloc.kernels.lora import padded_rank


def batched_update(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Tensor,
    *,
    zeros: dict[tuple[int, ...], Tensor] | None = None,
) -> Tensor:
    """The outputs of a linear layer with K adapters.

    The way back adds the gradients of A and B to their `.grad` by itself: of K adapters autograd
    would take each weight for a branch of its own, which costs more than the products.

    Args:
        x: What the layer reads, shape (K, n, in_features).
        base: What its frozen part puts out, shape (K, n, out_features).
        a: A of each adapter, shape (r_k, in_features); an adapter may have no rank here.
        b: B of each, shape (out_features, r_k).
        scalings: What each update is multiplied by, shape (K, 1, 1), of x's dtype.
        zeros: Where the zeros that ranks are padded with are kept from call to call.

    Returns:
        base + s_k (x_k A_k^T) B_k^T, shape (K, n, out_features).
    """
    update: Any = _BatchedUpdate
    begin = x.new_empty(0).requires_grad_(any(weight.requires_grad for weight in a))
    kept = {} if zeros is None else zeros
    return cast(Tensor, update.apply(begin, x, base, scalings, tuple(a), tuple(b), kept))


class _BatchedUpdate(torch.autograd.Function):
    """`begin` lets the way back come by where nothing that is read has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        begin: Tensor,
        x: Tensor,
        base: Tensor,
        scalings: Tensor,
        a: tuple[Tensor, ...],
        b: tuple[Tensor, ...],
        zeros: dict[tuple[int, ...], Tensor],
    ) -> Tensor:
        ranks = [len(a_k) for a_k in a]
        largest = padded_rank(max(ranks), x.dtype)
        sa = _stacked(a, ranks, largest, zeros, dim=0).to(x.dtype).view(len(x), largest, -1)
        sa = sa * scalings
        # (out, K R) in memory, so that no B is transposed.
        b_all = _stacked(b, ranks, largest, zeros, dim=1).to(x.dtype).view(-1, len(x), largest)
        b_all = b_all.transpose(0, 1)  # (K, out, R)
        h = torch.bmm(x, sa.transpose(1, 2))
        y = torch.baddbmm(base, h.to(base.dtype), b_all.to(base.dtype).transpose(1, 2))
        ctx.save_for_backward(x, h, sa, b_all, scalings)
        ctx.ranks, ctx.weights = ranks, (a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, sa, b_all, scalings = ctx.saved_tensors
        a, b = ctx.weights
        dy_x = dy.to(x.dtype)
        dh = torch.bmm(dy_x, b_all)
        dx = torch.bmm(dh, sa) if ctx.needs_input_grad[1] else None
        da = (torch.bmm(dh.transpose(1, 2), x) * scalings).to(a[0].dtype)  # (K, R, in)
        db = torch.bmm(dy_x.transpose(1, 2), h).to(b[0].dtype)  # (K, out, R)
        start = 0
        # Neighbours of one rank are cut out together, and lie in memory as their weights do.
        for rank, some in itertools.groupby(ctx.ranks):
            end = start + len(list(some))
            _add(a[start:end], da[start:end, :rank])
            _add(b[start:end], db[start:end, :, :rank].contiguous())
            start = end
        return None, dx, dy if ctx.needs_input_grad[2] else None, None, None, None, None


def _add(weights: Sequence[Tensor], gradients: Tensor) -> None:
    """Add a gradient to that of each weight."""
    for weight, gradient in zip(weights, gradients.unbind(), strict=True):
        if weight.requires_grad:
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


def _stacked(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    largest: int,
    zeros: dict[tuple[int, ...], Tensor],
    *,
    dim: int,
) -> Tensor:
    """The weights one after another along the dimension of their ranks, each padded."""
    if min(ranks) == largest:
        return torch.cat(weights, dim=dim)  # type: ignore[arg-type]
    parts: list[Tensor] = []
    for weight, rank in zip(weights, ranks, strict=True):
        parts.append(weight)
        if missing := largest - rank:
            if (missing, dim) not in zeros:
                shape = list(weight.shape)
                shape[dim] = missing
                zeros[missing, dim] = weight.new_zeros(shape).detach()
            parts.append(zeros[missing, dim])
    return torch.cat(parts, dim=dim)


@dataclass(kw_only=True)
class Blocks:
    """How the rows of the batch in hand are divided among adapters."""

    adapters: tuple[int, ...] = ()
    """The adapter of each block, by its number; all blocks have as many rows."""

    num_rows: int = 0
    """Rows of the batch."""


class BlockedLinear(nn.Module):
    """A frozen linear layer under several models' LoRA layers, block by block.

    The LoRA layers stay where they are, in models of their own; their weights are looked up in
    every forward, as a change of ranks puts others there.

    Args:
        layers: The LoRA layer of each model on this linear; the frozen layer is the first one's.
        blocks: How the rows are divided, set before each forward.
        adapter_name: PEFT's name of every model's adapter.
    """

    def __init__(
        self, layers: Sequence[LoraLayer], blocks: Blocks, *, adapter_name: str = "default"
    ) -> None:
        super().__init__()
        self.base_layer = layers[0].base_layer
        self._blocks = blocks
        # Not the weights, which are replaced, nor the layers, which would become submodules.
        self._a = [layer.lora_A[adapter_name]._parameters for layer in layers]
        self._b = [layer.lora_B[adapter_name]._parameters for layer in layers]
        self._scalings = [float(layer.scaling[adapter_name]) for layer in layers]
        self._on_device: dict[tuple[Any, ...], Tensor] = {}
        self._zeros: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Shape (num_rows, ..., in_features) to (num_rows, ..., out_features).

        Raises:
            TypeError: It reads something else than all rows of the batch in their order.
        """
        base: Tensor = self.base_layer(x)
        adapters, num_rows = self._blocks.adapters, self._blocks.num_rows
        if x.shape[0] % num_rows:
            raise TypeError(
                f"An adapted linear layer reads {tuple(x.shape)} of a batch of {num_rows} rows, so "
                "that rows cannot be told apart by their run; train one by one."
            )
        a: list[Any] = [self._a[number]["weight"] for number in adapters]
        b: list[Any] = [self._b[number]["weight"] for number in adapters]
        if not any(map(len, a)):
            return base
        blocks = (len(adapters), -1)
        y = batched_update(
            x.reshape(*blocks, x.shape[-1]),
            base.reshape(*blocks, base.shape[-1]),
            *(a, b, self._scaling(adapters, x)),
            zeros=self._zeros,
        )
        return y.view(base.shape)

    def _scaling(self, adapters: tuple[int, ...], x: Tensor) -> Tensor:
        key = (adapters, x.dtype, x.device)
        if key not in self._on_device:  # a copy to a GPU would be waited for in every forward
            values = [self._scalings[number] for number in adapters]
            self._on_device[key] = torch.tensor(values, dtype=x.dtype, device=x.device)[
                :, None, None
            ]
        return self._on_device[key]


class BlockedModule(nn.Module):
    """A module that each model has a trained one of: block by block, each through its own.

    Args:
        modules: The module of each model.
        blocks: How the rows are divided, set before each forward.
    """

    def __init__(self, modules: Sequence[nn.Module], blocks: Blocks) -> None:
        super().__init__()
        self._each = tuple(modules)  # a tuple, so that they are no submodules
        self._blocks = blocks

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs of all blocks in their order."""
        parts = zip(self._blocks.adapters, x.chunk(len(self._blocks.adapters)), strict=True)
        return torch.cat([self._each[number](part, *args, **kwargs) for number, part in parts])
