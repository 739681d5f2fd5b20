"""Hu et al. 2022 on plain lists: the shift, the probabilities, the gate and the final choice."""

import math


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def zeta(alphas: list[float], sizes: list[int], budget: int, beta: float = 1.0) -> float:
    """The root of sum_i p_i n_i = budget (1 - 1e-7), between bounds that hold any root of ours."""
    low, high = min(alphas) - 50 * beta, max(alphas) + 50 * beta
    while high - low > 1e-13 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        expected = sum(
            sigmoid((alpha - middle) / beta) * size
            for alpha, size in zip(alphas, sizes, strict=True)
        )
        if expected > budget * (1 - 1e-7):
            low = middle
        else:
            high = middle
    return low


def probability(
    alphas: list[float], sizes: list[int], budget: int, beta: float = 1.0
) -> list[float]:
    shift = zeta(alphas, sizes, budget, beta)
    return [sigmoid((alpha - shift) / beta) for alpha in alphas]


def derivative(p: list[float], of: int, by: int, beta: float = 1.0) -> float:
    """Of p_of by alpha_by, where p = s_of / (s_1 + ... + s_n) S with a constant S of their sum.

    With s' = s (1 - s) / beta the derivative of s_by by its alpha, the quotient rule gives
    (s_of' [of = by] sum - s_of s_by') / sum^2 S, and S = sum.
    """
    total = sum(p)
    slope = p[by] * (1 - p[by]) / beta
    return ((slope * total if of == by else 0.0) - p[of] * slope) / total


def gate(p: float, u: float) -> float:
    return sigmoid(math.log(u * p / ((1 - u) * (1 - p))))


def choice(p: list[float], sizes: list[int], budget: int) -> set[int]:
    """Again and again the most probable unit that was not looked at: it stays if it fits."""
    kept: set[int] = set()
    waiting = list(range(len(p)))
    while waiting:
        best = waiting[0]
        for index in waiting:
            if p[index] > p[best]:
                best = index
        waiting.remove(best)
        if sum(sizes[index] for index in kept) + sizes[best] <= budget:
            kept.add(best)
    return kept
