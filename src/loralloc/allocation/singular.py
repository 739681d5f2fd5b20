"""The singular form of LoRA weights: the same product, with ranks that share nothing.

Ranks as they are trained share what they do, so that one alone says little of what its loss costs.
In B A = U S V^T every rank is a singular direction, and the smallest can go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.layers import experts_of, lora_layers, weight_a, weight_b
from loralloc.allocation.optimizer_state import (
    QUANTISED,
    bare_optimizer,
    by_gradient,
    byte_blocks,
    dequantised,
    quantised,
)

LINEAR = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev", "state1"})
"""What optimisers keep that is a mean of gradients, or one of them."""


def singular_form(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B and A of the same product with orthogonal columns and rows, the largest part first.

    Args:
        b: Shape (out_features, num_ranks).
        a: Shape (num_ranks, in_features).

    Returns:
        U sqrt(S), sqrt(S) V^T and S, shape (num_ranks,), where B A = U S V^T; in float32.
    """
    u, s, vt = _parts(b, a)
    root = s.sqrt()
    return u * root, root[:, None] * vt, s


@torch.no_grad()
def take_singular_form(
    model: nn.Module, optimizer: Optimizer | None = None, *, adapter_name: str = "default"
) -> None:
    """Bring every module's B A = U S V^T into the form B = U S / c, A = c V^T, in place.

    c is the root mean square of the lengths of A's old rows, so that both weights stay as large as
    training made them. The optimiser's state turns with the weights: with A' = T A and P = T^-1 the
    gradients are

        dL/dA' = P^T dL/dA        dL/dB' = dL/dB T^T

    and so are their running means; of means of squares, which know nothing of how elements go
    together, the squared factors are taken, as if they did not. Modules of experts stay as they
    are.

    Args:
        model: A PEFT model with a LoRA adapter.
        optimizer: What trains it, under wrappers or not.
        adapter_name: PEFT's name of the adapter.
    """
    layers, bare = lora_layers(model, adapter_name), bare_optimizer(optimizer)
    for name, layer in layers.items():
        if name in experts_of(layers):
            continue
        a, b = weight_a(layer, adapter_name), weight_b(layer, adapter_name)
        u, s, vt = _parts(b, a)
        size = float(a.float().norm()) / math.sqrt(len(a)) or 1.0
        turned = (size * vt, u * (s / size))
        replicas.share(turned)  # singular vectors have no sign of their own
        from_old, to_old = _between(a, turned[0])
        a.copy_(turned[0])
        b.copy_(turned[1])
        if bare is not None:
            _turn(bare, a, to_old.T, dim=0)
            _turn(bare, b, from_old, dim=1)


def _parts(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T, of as many ranks as B and A have, in float32."""
    # The product itself is never made: it has as many elements as the weight.
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    more = b.shape[1] - len(s)  # of a module that is narrower than its rank
    return F.pad(q_b @ u, (0, more)), F.pad(s, (0, more)), F.pad(vt @ q_a.T, (0, 0, 0, more))


def _between(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """T of new = T old, and P of old = P new, each of shape (num_ranks, num_ranks)."""
    old, new = old.double(), new.double()
    return new @ torch.linalg.pinv(old), old @ torch.linalg.pinv(new)


def _turn(optimizer: Optimizer, weight: nn.Parameter, matrix: Tensor, *, dim: int) -> None:
    """Let an optimiser's state of a weight follow, where its gradient is multiplied by a matrix.

    Args:
        optimizer: What trains the weight.
        weight: A, with `dim` 0, or B, with 1.
        matrix: What multiplies the ranks of its gradient, shape (num_ranks, num_ranks).
        dim: Dimension of the ranks.
    """
    state = optimizer.state.get(weight, {})
    powers = by_gradient(optimizer, state)
    for key, value in state.items():
        if powers.get(key):
            factors = matrix.abs().float() ** powers[key]
        elif key in LINEAR - powers.keys() and isinstance(value, Tensor):
            factors = matrix.float()
        else:
            continue
        in_blocks = byte_blocks(key, state)
        flat = (dequantised(*in_blocks) if in_blocks else value).float()
        followed = factors @ flat if dim == 0 else flat @ factors.T
        if in_blocks:
            codes, largest = quantised(followed, in_blocks[1])
            value.copy_(codes)
            state[QUANTISED[key][1]].copy_(largest)
        else:
            value.copy_(followed)
