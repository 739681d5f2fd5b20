"""What ElaLoRA, IncreLoRA, IGU-LoRA, L1RA, GoRA and EVA compute, one number at a time."""

import math

import numpy as np

from reference.adalora import BETA1, BETA2, Smoothed

Matrix = list[list[float]]


# ElaLoRA.


def exchange(scores: list[list[float]], costs: list[int], *, k: int, b: int, spare: int):
    """Chang et al. 2025, Section 3.2: (pruned, given) triplets of every module, and what is left.

    The k least of each module, but for its last one, are candidates; of all candidates the b least
    go, and the b largest name the modules that receive, while the parameters last; what they leave
    goes to the next candidates that stay.
    """
    candidates = []
    for module, values in enumerate(scores):
        least = sorted(range(len(values)), key=lambda i: (values[i], i))[: min(k, len(values) - 1)]
        candidates += [(values[i], module, i) for i in least]
    ascending = sorted(candidates)
    pruned = [[] for _ in scores]
    for _, module, index in ascending[:b]:
        pruned[module].append(index)
        spare += costs[module]
    given = [0] * len(scores)
    descending = sorted(ascending, key=lambda entry: -entry[0])
    receivers = [module for _, module, _ in descending[:b]]
    receivers += [module for _, module, index in descending[b:] if index not in pruned[module]]
    for module in receivers:
        if costs[module] <= spare:
            given[module] += 1
            spare -= costs[module]
    return [sorted(indices) for indices in pruned], given, spare


def num_moved(step: int, *, b: int, first: int, last: int) -> int:
    """b(t), falling to 0 with the cube of the time between the first and the last round."""
    return round(b - b * ((step - first) / (last - first)) ** 3)


# IncreLoRA.


def module_sensitivity(update: Matrix, gradient: Matrix) -> float:
    """Zhang et al. 2023: sum |w dL/dw| over the elements, over the root of their number."""
    total, number = 0.0, 0
    for row, of_row in zip(update, gradient, strict=True):
        for w, g in zip(row, of_row, strict=True):
            total += abs(w * g)
            number += 1
    return total / math.sqrt(number)


def smoothed(values: list[float]) -> float:
    """Ibar Ubar of a module after these steps."""
    mean = deviation = 0.0
    for value in values:
        mean = BETA1 * mean + (1 - BETA1) * value
        deviation = BETA2 * deviation + (1 - BETA2) * abs(value - mean)
    return mean * deviation


# IGU-LoRA.


class Certain(Smoothed):
    """Cui et al. 2026: the mean sensitivity over its deviation."""

    @property
    def score(self) -> float:
        return (self.sensitivity + 1e-6) / (self.uncertainty + 1e-6)


def igu_budget(step: int, *, start: int, end: int, first: int, last: int) -> int:
    """b(t): all until `first`, the end's from `last` on, between them a cube."""
    if step <= first:
        return start
    if step >= last:
        return end
    return int(end + (start - end) * (1 - (step - first) / (last - first)) ** 3)


def off_diagonal(rows: Matrix) -> float:
    """The root of the sum of squares of all products of two different rows."""
    total = 0.0
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j:
                total += sum(x * y for x, y in zip(one, other, strict=True)) ** 2
    return math.sqrt(total)


# L1RA.


def reassign(gates: list[list[float]], costs: list[int], spare: int):
    """Singh et al. 2025, Algorithm 1: (pruned, given) of every module, and what is left."""
    pruned, receivers = [], []
    for m, of_module in enumerate(gates):
        empty = [i for i, c in enumerate(of_module) if c <= 0]
        if not empty:
            receivers.append(m)
        if len(empty) == len(of_module):
            empty.pop()
        pruned.append(empty)
    spare += sum(cost * len(empty) for cost, empty in zip(costs, pruned, strict=True))
    receivers.sort(key=lambda m: -min(gates[m]))
    given = [0] * len(gates)
    while any(costs[m] <= spare for m in receivers):
        for m in receivers:
            if costs[m] <= spare:
                given[m] += 1
                spare -= costs[m]
    return pruned, given, spare


# GoRA.


def gora_importance(weight: Matrix, gradient: Matrix) -> float:
    """He et al. 2025: the mean of |w dL/dw|."""
    values = [
        abs(w * g)
        for row, of_row in zip(weight, gradient, strict=True)
        for w, g in zip(row, of_row, strict=True)
    ]
    return sum(values) / len(values)


def gora_ranks(importance, costs, *, total: float, least: int, most: int) -> list[int]:
    """A share of the total by importance, over the root of a layer's width, within limits."""
    whole = sum(importance)
    ranks = []
    for value, cost in zip(importance, costs, strict=True):
        rank = round(total * (value / whole) / math.sqrt(cost))
        ranks.append(min(most, max(least, rank)))
    return ranks


def gora_b(gradient: np.ndarray, a: np.ndarray, *, step_size: float, scale: float) -> np.ndarray:
    """B of the step that the adapter begins with."""
    rank, inputs = a.shape
    inverse = np.linalg.inv(a @ a.T)
    return -step_size * math.sqrt(inputs / rank) * gradient @ a.T @ inverse / scale


# EVA.


def eva_ranks(inputs: list[np.ndarray], *, rank: int, rho: float) -> list[int]:
    """Paischer et al. 2024: the largest shares of variance of all layers, so many as the budget."""
    pool = []
    for layer, x in enumerate(inputs):
        values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        shares = values / values.sum()
        pool += [(share, layer) for share in shares[: round(rho * rank)]]
    pool.sort(reverse=True)
    chosen = [layer for _, layer in pool[: rank * len(inputs)]]
    return [chosen.count(layer) for layer in range(len(inputs))]
