"""Eq. 6 to first order: two backward passes for all ranks.

With dS/dg_r the derivative by the gate of rank r, S(M) - S(M without r) is about dS/dg_r at the
trained adapter, and S(M with only r) - S(M_0) about dS/dg_r at the base model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loralloc.allocation.importance.path import derivatives
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores


def score(objective: Objective, weights_b: Mapping[str, Tensor], limits: Limits) -> Scores:
    """Importance of every rank, to first order.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        limits: Its `experts` are read; what will be pruned decides nothing here.
    """
    (without, s_full), (only, s_base) = derivatives(objective, weights_b, (1, 0), limits.experts)
    return Scores(
        terms={"without": without, "only": only}, s_full=s_full, s_base=s_base, settled=False
    )
