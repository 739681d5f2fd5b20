"""K low-rank updates at once, each on its own block of a batch's rows.

Rows lie in K blocks of n tokens, and block k goes through adapter k. With A and B padded by zeros
to the largest rank R of the K, which change no sum, an update is two batched products:

    forward     H = X (sA)^T            Y = base + H B^T              X (K, n, in), A (K, R, in)
    backward    dH = dY B               dX = dH (sA)                  H (K, n, R), B (K, out, R)
                dA = s dH^T X           dB = dY^T H

The frozen linear is no part of this: it is one product for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralloc.kernels.packed import padded_rank


def batched_update(
    x: Tensor, base: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scalings: Tensor
) -> Tensor:
    """The outputs of a linear layer with K adapters.

    Args:
        x: What the layer reads, shape (K, n, in_features).
        base: What its frozen part puts out, shape (K, n, out_features).
        a: A of each adapter, shape (r_k, in_features); an adapter may have no rank here.
        b: B of each, shape (out_features, r_k).
        scalings: What each update is multiplied by, shape (K, 1, 1), of x's dtype.

    Returns:
        base + s_k (x_k A_k^T) B_k^T, shape (K, n, out_features).
    """
    update: Any = _BatchedUpdate
    return cast(Tensor, update.apply(x, base, scalings, *a, *b))


class _BatchedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, scalings: Tensor, *weights: Any) -> Tensor:
        a, b = weights[: len(x)], weights[len(x) :]
        ranks = [len(a_k) for a_k in a]
        largest = padded_rank(max(ranks), x.dtype)
        sa = _stacked(a, ranks, largest, dim=0).to(x.dtype).view(len(x), largest, -1) * scalings
        # (out, K R) in memory, so that no B is transposed.
        b_all = _stacked(b, ranks, largest, dim=1).to(x.dtype).view(-1, len(x), largest)
        b_all = b_all.transpose(0, 1)  # (K, out, R)
        h = torch.bmm(x, sa.transpose(1, 2))
        y = torch.baddbmm(base, h.to(base.dtype), b_all.to(base.dtype).transpose(1, 2))
        ctx.save_for_backward(x, h, sa, b_all, scalings)
        ctx.ranks, ctx.dtypes = ranks, (a[0].dtype, b[0].dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, sa, b_all, scalings = ctx.saved_tensors
        dy_x = dy.to(x.dtype)
        dh = torch.bmm(dy_x, b_all)
        dx = torch.bmm(dh, sa) if ctx.needs_input_grad[0] else None
        da = (torch.bmm(dh.transpose(1, 2), x) * scalings).to(ctx.dtypes[0])
        db = torch.bmm(dy_x.transpose(1, 2), h).to(ctx.dtypes[1])
        # Views: autograd copies into a parameter's own layout what does not have it.
        das = [da_k[:rank] for da_k, rank in zip(da, ctx.ranks, strict=True)]
        dbs = [db_k[:, :rank] for db_k, rank in zip(db, ctx.ranks, strict=True)]
        return dx, dy, None, *das, *dbs


def _stacked(weights: Sequence[Tensor], ranks: Sequence[int], largest: int, *, dim: int) -> Tensor:
    """The weights one after another along the dimension of their ranks, each padded."""
    if min(ranks) == largest:
        return torch.cat(list(weights), dim=dim)
    shape = list(weights[0].shape)
    shape[dim] = largest - min(ranks)
    zeros = weights[0].new_zeros(shape)
    parts: list[Tensor] = []
    for weight, rank in zip(weights, ranks, strict=True):
        parts += [weight, zeros.narrow(dim, 0, largest - rank)]
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
