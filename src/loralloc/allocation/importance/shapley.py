"""The improvement divided among the ranks: Aumann-Shapley values along the adapter's path.

Scale the whole adapter by t, from the base model to the trained one. The integral over t of dS/dg_r
is what rank r contributes on the way, and the values of all ranks sum to S(M) - S(M_0). Eq. 6 to
first order is twice the trapezoid of that integral on its two ends; here it is taken on
Gauss-Legendre nodes (Aumann & Shapley 1974; along a path, Sundararajan et al. 2017).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from loralloc.allocation.importance.path import derivatives, gates_at
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores

TOLERANCE = 0.01
"""Relative gap between the sum of the shares and S(M) - S(M_0) at which the nodes suffice."""

MOST_DOUBLINGS = 3


def score(
    objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits, *, num_nodes: int = 5
) -> Scores:
    """The share of every rank in S(M) - S(M_0).

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: Its `experts` are read; what will be pruned decides nothing here.
        num_nodes: Points of the path where the derivative is taken, one backward pass each. They
            are doubled, up to three times, until the shares sum to the whole within `TOLERANCE`:
            after a steep descent S is far from a polynomial along the path.
    """
    with objective.evaluating():
        s_full = -objective.mean_loss()
        with gates_at(weights_b, 0):
            s_base = -objective.mean_loss()
    improvement = s_full - s_base
    for doublings in range(MOST_DOUBLINGS + 1):
        share = _integral(objective, weights_b, num_nodes * 2**doublings, limits.experts)
        total = sum(float(part.double().sum()) for part in share.values())
        if abs(total - improvement) <= TOLERANCE * abs(improvement):
            break
    return Scores(terms={"share": share}, s_full=s_full, s_base=s_base, settled=False)


def _integral(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    num_nodes: int,
    experts: Mapping[str, int],
) -> dict[str, Tensor]:
    """The integral of dS/dg over the path for every rank, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)  # on (-1, 1)
    share: dict[str, Tensor] = {}
    points = [(1 + float(node)) / 2 for node in nodes]
    slopes = derivatives(objective, weights_b, points, experts)
    for (at_node, _), weight in zip(slopes, weights, strict=True):
        for name, slope in at_node.items():
            part = slope * (float(weight) / 2)
            share[name] = share[name] + part if name in share else part
    return share
