"""Giving ranks to the modules whose next rank is worth most: a policy beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loralloc.allocation.policy import Limits, Plan, Scores, choose_pruned, kept_of

MOST = 8
"""Ranks that one module is given in a round at most, where the modules are enough to take all."""


def num_known(num_pruned: int, num_modules: int) -> int:
    """How many next ranks of a module are to be known for a round.

    Args:
        num_pruned: Ranks that the round prunes.
        num_modules: Modules that may receive.
    """
    return max(min(num_pruned, MOST), -(-num_pruned // num_modules))


def plan(scores: Scores, limits: Limits) -> Plan:
    """Plan one round: prune the least important ranks, give where a rank is worth most of its cost.

    Pruned are the ranks that the paper's rule prunes. Then the freed budget buys one rank after
    another, each of the module whose next rank has the largest worth a unit of cost (`scores.worth`
    by `limits.cost`); ties go to the earlier module. A module may receive in a round in which it
    lost a rank, for another direction, and what nobody can take is left for the next round.

    Args:
        scores: Importance of every rank, and what next ranks are worth.
        limits: What the plan may do.
    """
    importance = scores.importance
    pruned = choose_pruned(importance, limits)
    kept = kept_of(importance, pruned)
    freed = sum(limits.cost_of(name) * len(gone) for name, gone in pruned.items())
    ranks = {name: len(kept[name]) for name, values in importance.items() if len(values)}
    given, unspent = buy(freed + limits.spare, ranks, scores.worth, limits)
    return Plan(
        kept=kept,
        added={name: given.get(name, 0) for name in importance},
        pruned=pruned,
        spare=unspent,
    )


def buy(
    available: int, ranks: Mapping[str, int], worth: Mapping[str, Tensor], limits: Limits
) -> tuple[dict[str, int], int]:
    """Buy rank after rank where the next is worth most of its cost, until nothing can be bought.

    Args:
        available: Units of the budget to spend.
        ranks: Current rank of each module that may receive, in model order.
        worth: What a module's next ranks are worth, descending; no more are bought than are known.
        limits: Its `max_rank` and `cost` are read.

    Returns:
        New ranks by module, and the units that are left.
    """
    values = {name: worth[name].tolist() for name in ranks if name in worth}
    given = dict.fromkeys(values, 0)

    def can_receive(name: str) -> bool:
        is_full = limits.max_rank is not None and ranks[name] + given[name] >= limits.max_rank
        return given[name] < len(values[name]) and not is_full and limits.cost_of(name) <= available

    while willing := [name for name in values if can_receive(name)]:
        # max() takes the first of equals.
        best = max(willing, key=lambda name: values[name][given[name]] / limits.cost_of(name))
        given[best] += 1
        available -= limits.cost_of(best)
    return given, available
