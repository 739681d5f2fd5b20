"""A frozen language-model head and its cross-entropy as one function, a few rows at a time.

The gradient of the hidden states is taken in the forward pass, where the logits are at hand: they
are computed once and never kept, so memory is bounded by one chunk whatever the batch.

    forward     z = h W^T + b        loss = logsumexp(z) - z[target]
    backward    dh = dloss (softmax(z) - onehot(target)) W
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralloc.kernels.products import autocast_dtype, linear

MOST_LOGITS = {"cpu": 2**22}
"""Logits held at once by kind of device: 16 MiB in float32 on a CPU, which its heap gives back to
the next chunk; larger ones are mapped and faulted in anew every time."""

MOST_LOGITS_ELSEWHERE = 2**25
"""128 MiB, with what is made of them about twice as much: products of a thousand rows keep a GPU
busy, and more would be the peak of a step."""

BLOCK = 512
"""Columns that are searched at once. A CPU finds a highest value some fifteen times as fast as the
place of it."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hidden W^T + bias, in float32 arithmetic on logits of the hidden's dtype.

    Args:
        hidden: Shape (tokens, in_features); may need a gradient. Under autocast it is cast first.
        weight: Shape (vocabulary, in_features), frozen; taken in the hidden's dtype.
        targets: Shape (tokens,), each within the vocabulary.
        bias: Shape (vocabulary,), frozen.

    Returns:
        The loss of every token, float32 of shape (tokens,) with its graph, and how many targets
        are the first of the highest logits of their row, which is what argmax takes.
    """
    function: Any = _LinearCrossEntropy
    hidden = hidden.to(autocast_dtype(hidden) or hidden.dtype)
    losses, correct = function.apply(hidden, weight, bias, targets)
    return losses, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        most = MOST_LOGITS.get(hidden.device.type, MOST_LOGITS_ELSEWHERE)
        rows = max(1, most // len(weight))
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = hidden.new_zeros((), dtype=torch.int64)
        for start in range(0, len(hidden), rows):
            h, chosen = hidden[start : start + rows], targets[start : start + rows, None]
            z = linear(h, weight, bias).float()  # (rows, vocabulary)
            right, (highest, place) = z.gather(1, chosen), _first_highest(z)
            correct += (place == chosen).sum()
            z.sub_(highest).exp_()
            norm = z.sum(1, keepdim=True)
            losses[start : start + rows] = (norm.log() + highest - right)[:, 0]
            if grad is not None:
                z.div_(norm)
                z.scatter_add_(1, chosen, z.new_full(chosen.shape, -1.0))
                grad[start : start + rows] = linear(z.to(h.dtype), weight.t())
        ctx.mark_non_differentiable(correct)
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad.float() * dlosses[:, None]).to(grad.dtype), None, None, None


def _first_highest(z: Tensor) -> tuple[Tensor, Tensor]:
    """The highest number of each row and the first column that has it, both of shape (rows, 1)."""
    width = z.shape[1]
    num_blocks = (width - 1) // BLOCK
    last = num_blocks * BLOCK  # where the last block begins; it is never empty
    whole = z[:, :last].reshape(len(z), num_blocks, BLOCK)  # a view
    of_blocks = torch.cat([whole.amax(2), z[:, last:].amax(1, keepdim=True)], 1)
    block = of_blocks.argmax(1, keepdim=True)
    columns = block * BLOCK + torch.arange(BLOCK, device=z.device)
    within = z.gather(1, columns.clamp(max=width - 1)).argmax(1, keepdim=True)
    return of_blocks.gather(1, block), block * BLOCK + within
