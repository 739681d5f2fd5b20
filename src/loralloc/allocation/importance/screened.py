"""Rank by gradient, settle the ranks near the cut by ablation.

The first-order scores decide for all ranks that are clearly above or below the cut. Where the
measured error of the first order leaves doubt, eq. 6 is computed exactly, so that the pruned set is
the one that ablation of all ranks would choose, as far as the errors seen can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from loralloc.allocation.importance import ablation, gradient
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Policy, Scores, distances_to_cut, plan

SAFETY = 2.0
"""A rank is in doubt within this many times the largest error seen on verified ranks."""

PROBE = 2
"""Ranks nearest the cut that are verified first, to see whether verifying can settle anything."""

ENOUGH = 16
"""Ranks nearest the cut that are verified before the error seen on them is trusted."""


def score(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    limits: Limits,
    *,
    most: int = 64,
    policy: Policy = plan,
    first_order: Callable[[Objective, Mapping[str, Tensor], Limits], Scores] | None = None,
) -> Scores:
    """Importance of every rank: exact near the cut, to first order elsewhere.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: What the round may prune.
        most: Ranks that may be verified at most. Where more are in doubt, or this is less than
            `ENOUGH`, the first-order scores decide alone. So they do where the model computes
            below float32, and ablation takes the difference of losses that are rounded more
            coarsely than one rank changes them, while a gradient's error stays relative to its
            size.
        policy: What will decide on the scores; what it prunes places the cut.
        first_order: What ranks them all, `gradient.score` by default. Terms of its own stay.
    """
    ranked = (first_order or gradient.score)(objective, weights_b, limits)
    if objective.rounding or most < ENOUGH or not ranked.is_finite():
        return ranked
    scores, error = ranked, 0.0
    verified: set[tuple[str, int]] = set()
    while True:
        pruned = policy(scores, limits).pruned
        distance = distances_to_cut(scores.importance, pruned, limits)
        nearest = [
            rank for rank in sorted(distance, key=distance.__getitem__) if rank not in verified
        ]
        num_doubtful = sum(distance[rank] <= SAFETY * error for rank in nearest) if verified else 0
        if len(verified) + num_doubtful > most:
            return ranked
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
            abs(float(scores.importance[name][index] - ranked.importance[name][index]))
            for name, index in verified
        )


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
        for term in exact.terms:
            terms[term][name][index] = exact.terms[term][name][index]
    return dataclasses.replace(scores, terms=terms)
