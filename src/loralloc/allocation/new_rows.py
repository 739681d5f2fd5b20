"""Rows of A for new ranks, along what the adapter does not explain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loralloc.allocation.importance.unexplained import Unexplained
from loralloc.allocation.policy import Plan

LENGTH = 1 / math.sqrt(3)
"""Root mean square of the length of a Kaiming-uniform row (a = sqrt 5), whose elements are uniform
up to 1 / sqrt(in)."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows of A that the first of a module's new ranks begin with."""

    rows: Tensor
    """Shape (num, in_features), no more than there are new ranks."""

    gradient: Tensor
    """|dL/db| of the new ranks with these rows, shape (num,), over the root mean square of that of
    the module's ranks that stay."""


def rows_of(plan: Plan, found: Mapping[str, Unexplained]) -> dict[str, NewRows]:
    """The rows that new ranks begin with: the largest directions found, as long as drawn rows are.

    Args:
        plan: Who receives, and which ranks stay.
        found: The directions of each module that receives.
    """
    rows = {}
    for name, count in plan.added.items():
        if not count:
            continue
        of = found[name]
        stay = list(plan.kept[name]) or list(range(len(of.own)))
        usual = float(of.own[stay].square().mean().sqrt())
        sizes = LENGTH * of.values[:count]
        gradient = sizes / usual if usual else sizes.new_ones(sizes.shape)
        rows[name] = NewRows(rows=LENGTH * of.rows[:count], gradient=gradient)
    return rows
