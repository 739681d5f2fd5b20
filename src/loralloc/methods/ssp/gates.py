"""How SSP searches: probabilities that spend a budget, gates drawn from them, what is kept.

A few hundred numbers, one for each unit of the search space: float64, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-7
"""How far a probability stays from 0 and 1, and the expected size, relatively, from the budget."""

HALVINGS = 64
"""They bring any two bounds of the root as near to each other as float64 tells apart."""


def shift(alphas: Tensor, sizes: Tensor, budget: int, beta: float = 1.0) -> Tensor:
    """The zeta at which the expected size is the budget, found by halving.

        sum_i p_i n_i = (1 - 1e-7) budget,    p_i = sigmoid((alpha_i - zeta) / beta)

    Args:
        alphas: Architecture weights alpha, shape (num_units,).
        sizes: Parameters n of the units, shape (num_units,); their sum is more than the budget.
        budget: Parameters that may be kept.
        beta: Temperature.

    Returns:
        A number, without a graph.
    """
    alphas, target = alphas.detach(), (1 - EPSILON) * budget
    # Where every p_i is at least this share, and where it is at most this share.
    even = beta * (target / sizes.sum()).logit()
    low, high = alphas.min() - even, alphas.max() - even
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_over = torch.dot(torch.sigmoid((alphas - middle) / beta), sizes) > target
        low, high = torch.where(is_over, middle, low), torch.where(is_over, high, middle)
    return (low + high) / 2


def probabilities(alphas: Tensor, sizes: Tensor, budget: int, beta: float = 1.0) -> Tensor:
    """The probability p of every unit, shape (num_units,); arguments as `shift` has them.

    zeta is a constant for the gradient, and p is p_i / sum(p) times a constant sum(p): one unit's
    gain is the others' loss.
    """
    p = torch.sigmoid((alphas - shift(alphas, sizes, budget, beta)) / beta)
    p = p.clamp(EPSILON, 1 - EPSILON)
    return p / p.sum() * p.sum().detach()


def relaxed_gates(p: Tensor, u: Tensor) -> Tensor:
    """A Bernoulli draw of every unit, made smooth: shape (num_units,).

        z = sigmoid(log(u p / ((1 - u)(1 - p))))

    Args:
        p: Probabilities, shape (num_units,).
        u: Uniform in [0, 1), shape (num_units,).
    """
    return torch.sigmoid(torch.logit(u, eps=EPSILON) + torch.logit(p))


def within_budget(p: Tensor, sizes: Sequence[int], budget: int) -> list[int]:
    """Indices of the units that are kept: by falling p, each that still fits; ties by order."""
    kept, left = [], budget
    for index in torch.argsort(p, descending=True, stable=True).tolist():
        if sizes[index] <= left:
            kept.append(index)
            left -= sizes[index]
    return sorted(kept)
