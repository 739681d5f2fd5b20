"""A control: the paper's policy on scores turned round, so that the most important ranks go."""

from __future__ import annotations

import dataclasses

from loralloc.allocation.policy import Limits, Plan, Scores, plan


def plan_inverse(scores: Scores, limits: Limits) -> Plan:
    """Plan one round as `policy.plan` does, with minus the importance of every rank.

    The highest are pruned, and the modules that lose none receive, those of the lowest mean first.

    Args:
        scores: Importance of every rank.
        limits: What the plan may do.
    """
    turned = {
        term: {name: -values for name, values in by_module.items()}
        for term, by_module in scores.terms.items()
    }
    return plan(dataclasses.replace(scores, terms=turned), limits)
