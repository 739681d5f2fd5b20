"""Young ranks scored by what they could still do, in units of the old ranks' scores.

A column b of B moved by d changes the loss by <dL/db, d> to first order, so that of all moves of
one length the best lowers it by |d| |dL/db|: what ranks could do over one length of way is in
proportion to their gradients. The length that makes gradients into scores is that at which young
ranks come, on average, to what the old ones have come to:

    k = mean_old IS(r) / mean_young |dL/db_i|.

What a young rank i does already, and what it would do over that length, together are

    IS(i) + k |dL/db_i|,

so that one with the gradient of an average young rank is worth as much as an average old one. The
gradients of young and old ranks are not compared: rows of A that have trained see larger ones than
rows that were drawn. With G = dL/dW the gradient is s G a_i for the rank's row a_i: it is large
where the row reads what the adapter has not explained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loralloc.allocation.importance.path import gradient_norms
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores

TERM = "potential"
"""The term that is added to what a score measures; 0 for a rank that is not young."""


def score(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    limits: Limits,
    *,
    measure: Callable[[Objective, Mapping[str, Tensor], Limits], Scores],
) -> Scores:
    """Importance of every rank, of young ones with their potential.

    It takes one backward pass more, in rounds in which any rank is young.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: Its `young` and `experts` are read.
        measure: The score that the potential is added to.
    """
    scores = measure(objective, weights_b, limits)
    importance = scores.importance
    potential = {name: torch.zeros_like(values) for name, values in importance.items()}
    if any(limits.young.values()):
        norms = gradient_norms(objective, weights_b, limits.experts)
        rate = _rate(importance, norms, limits.young)
        for name, of in norms.items():
            chosen = sorted(limits.young.get(name, ()))
            potential[name][chosen] = (rate * of[chosen]).to(potential[name])
    return dataclasses.replace(scores, terms={**scores.terms, TERM: potential})


def _rate(
    importance: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    young: Mapping[str, frozenset[int]],
) -> float:
    """Mean worth of an old rank over the mean gradient of a young one; 0 where it is nothing."""
    worth: list[float] = []
    gradient: list[float] = []
    for name, values in importance.items():
        are_young = young.get(name, frozenset())
        for i, value in enumerate(values.tolist()):
            if i in are_young:
                gradient.append(float(norms[name][i]))
            else:
                worth.append(value)
    if not worth or not sum(gradient):
        return 0.0
    return max(sum(worth) / len(worth), 0.0) / (sum(gradient) / len(gradient))
