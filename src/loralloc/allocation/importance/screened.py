"""Rank by gradient, settle the ranks near the cut by ablation.

The first-order scores decide for all ranks that are clearly above or below the cut. Where the
measured error of the first order leaves doubt, eq. 6 is computed exactly, so that the pruned set is
the one that ablation of all ranks would choose, as far as the errors seen can tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from loralloc.allocation.importance import ablation, gradient
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores, choose_pruned

SAFETY = 2.0
"""A rank is in doubt within this many times the largest error seen on verified ranks."""

PROBE = 2
"""Ranks nearest the cut that are verified first, to see whether verifying can settle anything."""

ENOUGH = 16
"""Ranks nearest the cut that are verified before the error seen on them is trusted."""


def score(
    objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits, *, most: int = 64
) -> Scores:
    """Importance of every rank: exact near the cut, to first order elsewhere.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: What the round may prune; it places the cut.
        most: Ranks that may be verified at most. Where more are in doubt, or this is less than
            `ENOUGH`, the first-order scores decide alone. So they do on a backbone below
            float32, where ablation takes the difference of losses that are rounded more coarsely
            than one rank changes them, while a gradient's error stays relative to its size.
    """
    first_order = gradient.score(objective, weights_b, limits)
    if objective.is_rounded or most < ENOUGH or not first_order.is_finite():
        return first_order
    scores, error = first_order, 0.0
    verified: set[tuple[str, int]] = set()
    while True:
        distance = distances_to_cut(scores.importance, limits)
        nearest = [
            rank for rank in sorted(distance, key=distance.__getitem__) if rank not in verified
        ]
        num_doubtful = sum(distance[rank] <= SAFETY * error for rank in nearest) if verified else 0
        if len(verified) + num_doubtful > most:
            return first_order
        num_missing = (ENOUGH if verified else PROBE) - len(verified)
        chosen = nearest[: max(num_doubtful, num_missing, 0)]
        if not chosen:
            return dataclasses.replace(
                scores, verified=_by_module(weights_b, verified), settled=True
            )
        exact = ablation.measure(objective, weights_b, _by_module(weights_b, chosen))
        scores = _put_in(scores, exact, chosen)
        verified.update(chosen)
        error = max(
            abs(float(scores.importance[name][index] - first_order.importance[name][index]))
            for name, index in verified
        )


def distances_to_cut(
    importance: Mapping[str, Tensor], limits: Limits
) -> dict[tuple[str, int], float]:
    """How far each rank's importance would have to move for the pruned set to change.

    Args:
        importance: A tensor of shape (num_ranks,) for each module.
        limits: What may be pruned.

    Returns:
        A distance of at least 0 by (module, index), for every rank whose fate is open: neither
        protected nor in a module that `min_rank` closes to pruning.
    """
    pruned = choose_pruned(importance, limits)
    values = {name: scores.tolist() for name, scores in importance.items()}
    left = {name: len(scores) - len(pruned.get(name, ())) for name, scores in values.items()}
    is_open = {name: left[name] > limits.min_rank for name in values}
    lost = {name: [values[name][i] for i in gone] for name, gone in pruned.items()}
    stay = {
        name: {
            i: score
            for i, score in enumerate(scores)
            if i not in pruned.get(name, ()) and i not in limits.protected.get(name, ())
        }
        for name, scores in values.items()
    }
    highest_pruned = max((max(scores) for scores in lost.values()), default=-math.inf)
    lowest_kept = min(
        (min(stay[name].values()) for name in stay if is_open[name] and stay[name]),
        default=math.inf,
    )
    distance = {}
    for name in values:
        # A module at `min_rank` swaps among its own ranks only.
        cut = highest_pruned if is_open[name] else max(lost.get(name, ()), default=-math.inf)
        for index, score in stay[name].items():
            distance[name, index] = score - cut
        rival = min(lowest_kept, min(stay[name].values(), default=math.inf))
        for index in pruned.get(name, ()):
            distance[name, index] = rival - values[name][index]
    return {rank: d for rank, d in distance.items() if d < math.inf}


def _by_module(
    names: Iterable[str], chosen: Collection[tuple[str, int]]
) -> dict[str, tuple[int, ...]]:
    """Ranks given as (module, index), gathered by module in model order."""
    grouped = {name: tuple(sorted(i for n, i in chosen if n == name)) for name in names}
    return {name: indices for name, indices in grouped.items() if indices}


def _put_in(scores: Scores, exact: Scores, chosen: Iterable[tuple[str, int]]) -> Scores:
    """The scores with the terms of the chosen ranks replaced by the exact ones."""
    terms = {
        term: {name: x.clone() for name, x in by_module.items()}
        for term, by_module in scores.terms.items()
    }
    for name, index in chosen:
        for term in terms:
            terms[term][name][index] = exact.terms[term][name][index]
    return dataclasses.replace(scores, terms=terms)
