"""SoRA's proximal step, SaLoRA's gates and penalty, and the budget, one rank at a time."""

import math

BETA, GAMMA, ZETA = 1.0, -0.1, 1.1


def soft_threshold(gate: float, xi: float) -> float:
    """Ding et al. 2023, eq. 8."""
    if gate > xi:
        return gate - xi
    if gate < -xi:
        return gate + xi
    return 0.0


def hard_concrete(log_a: float, u: float) -> float:
    """Louizos et al. 2018, eqs. 10 and 11."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_a) / BETA))
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def chance_open(log_a: float) -> float:
    """Louizos et al. 2018, eq. 12: 1 - Q(s-bar <= 0)."""
    return 1 / (1 + math.exp(-(log_a - BETA * math.log(-GAMMA / ZETA))))


def lagrangian(
    log_a: list[float], costs: list[int], *, target: float, multipliers: tuple[float, float]
) -> float:
    """Wang et al. 2020, eq. 7, with the size as a share of all."""
    expected = sum(cost * chance_open(x) for x, cost in zip(log_a, costs, strict=True))
    excess = expected / sum(costs) - target
    return multipliers[0] * excess + multipliers[1] * excess**2


def keep_highest(importance: list[float], costs: list[int], budget: int) -> list[bool]:
    """Drop the lowest, one by one, until the others fit the budget."""
    kept = [True] * len(importance)
    while sum(cost for cost, stays in zip(costs, kept, strict=True) if stays) > budget:
        lowest = min((x, index) for index, x in enumerate(importance) if kept[index])
        kept[lowest[1]] = False
    return kept
