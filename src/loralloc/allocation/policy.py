"""Which ranks to prune and who receives them: pure functions on numbers.

Imports torch and the standard library, nothing else. Modules are given by name, and the order of
the names is the order of the model: it breaks every tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What each rank contributes, measured on the scoring batch or gathered while training.

    The terms that a score adds up are kept apart, for they behave differently. Eq. 6 of Liu et al.
    2024 has two: "without", S(M) - S(M without rank r), and "only", S(M with only rank r) -
    S(M_0). S is minus the mean cross-entropy, M the model with its adapter, M_0 without. "only"
    leaves out a constant that all ranks share, so exact and first-order scores have one scale.
    Sensitivity has three, of a rank's "gate", its "row" of A and its "column" of B; a learned
    architecture has one, the value of its "gate".
    """

    terms: Mapping[str, Mapping[str, Tensor]]
    """Each term by its name: a tensor of shape (num_ranks,) for each module."""

    s_full: float | None = None
    """S(M); None where it was not measured."""

    s_base: float | None = None
    """S(M_0); None where it was not measured."""

    verified: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ranks whose terms were measured by ablation; others are first order."""

    settled: bool = True
    """Whether ablation settled which ranks to prune, as far as the errors seen can tell."""

    @property
    def importance(self) -> dict[str, Tensor]:
        """IS(r), the sum of the terms: shape (num_ranks,) for each module."""
        first, *others = self.terms.values()
        return {name: sum((t[name] for t in others), start=first[name]) for name in first}

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        measured = [s for s in (self.s_full, self.s_base) if s is not None]
        terms = (x for term in self.terms.values() for x in term.values())
        return all(map(math.isfinite, measured)) and all(bool(x.isfinite().all()) for x in terms)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan may do."""

    num_pruned: int
    """Ranks to prune in this round (n_A)."""

    min_rank: int = 0
    """Rank below which no module is pruned."""

    max_rank: int | None = None
    """Rank above which no module receives."""

    protected: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Ranks that may not be pruned, by module."""

    cost: Mapping[str, int] = field(default_factory=dict)
    """What one rank of a module costs, in units of the budget; 1 where a module is missing."""

    spare: int = 0
    """Units of the budget that earlier rounds could not spend."""

    def cost_of(self, name: str) -> int:
        """Units of the budget that one rank of the module costs."""
        return self.cost.get(name, 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a round does to each module."""

    kept: Mapping[str, tuple[int, ...]]
    """Indices of the ranks that stay, ascending, for every module."""

    added: Mapping[str, int]
    """New ranks, for every module."""

    pruned: Mapping[str, tuple[int, ...]]
    """Indices of the ranks that go, ascending, for the modules that lose any."""

    spare: int = 0
    """Units of the budget left for the next round."""

    lost: int = 0
    """Units of the budget given up because no module could receive (footnote 5 of the paper)."""

    def rank_after(self, name: str) -> int:
        """The module's rank once the plan is carried out."""
        return len(self.kept[name]) + self.added[name]


def choose_pruned(importance: Mapping[str, Tensor], limits: Limits) -> dict[str, tuple[int, ...]]:
    """Choose the ranks with the lowest importance, in one pool over all modules.

    Ties go to the earlier module, then to the lower index. Fewer than `limits.num_pruned` are
    chosen only where protection and `min_rank` leave no more.

    Args:
        importance: A tensor of shape (num_ranks,) for each module.
        limits: Its `num_pruned`, `min_rank` and `protected` are read.

    Returns:
        Indices by module, ascending, for the modules that lose any.
    """
    pool = sorted(
        (score, order, index)
        for order, scores in enumerate(importance.values())
        for index, score in enumerate(scores.tolist())
    )
    names = list(importance)
    left = [len(scores) for scores in importance.values()]
    chosen: dict[str, list[int]] = {}
    remaining = limits.num_pruned
    for _, order, index in pool:
        if remaining == 0:
            break
        name = names[order]
        if left[order] <= limits.min_rank or index in limits.protected.get(name, ()):
            continue
        left[order] -= 1
        remaining -= 1
        chosen.setdefault(name, []).append(index)
    return {name: tuple(sorted(chosen[name])) for name in names if name in chosen}


def share_out(available: int, receivers: Mapping[str, int], limits: Limits) -> dict[str, int]:
    """Give new ranks in turns, one each, until nothing more can be bought.

    Turns in order of preference are the paper's "as evenly as possible, the remainder to the
    modules with the highest mean importance".

    Args:
        available: Units of the budget to spend.
        receivers: Current rank of each module that may receive, in order of preference.
        limits: Its `max_rank` and `cost` are read.

    Returns:
        New ranks by module, for the modules that receive any.
    """
    given = dict.fromkeys(receivers, 0)
    willing = list(receivers)
    while willing:
        still_willing = []
        for name in willing:
            full = limits.max_rank is not None and receivers[name] + given[name] >= limits.max_rank
            if full or limits.cost_of(name) > available:
                continue
            given[name] += 1
            available -= limits.cost_of(name)
            still_willing.append(name)
        willing = still_willing
    return {name: count for name, count in given.items() if count}


def plan(scores: Scores, limits: Limits) -> Plan:
    """Plan one round: prune the least important ranks, give their budget to other modules.

    Receivers are the modules that lose no rank in this round and still have one (Liu et al. 2024,
    Algorithm 1 with footnotes 4 and 5). Without any receiver the freed budget is lost.

    Args:
        scores: Importance of every rank.
        limits: What the plan may do.
    """
    importance = scores.importance
    pruned = choose_pruned(importance, limits)
    mean = {
        name: float(values.mean())
        for name, values in importance.items()
        if name not in pruned and len(values)
    }
    # sorted() is stable: equal means stay in model order.
    preference = sorted(mean, key=lambda name: -mean[name])
    freed = sum(limits.cost_of(name) * len(gone) for name, gone in pruned.items())
    available = freed + limits.spare
    receivers = {name: len(importance[name]) for name in preference}
    given = share_out(available, receivers, limits)
    unspent = available - sum(limits.cost_of(name) * count for name, count in given.items())
    return Plan(
        kept={
            name: tuple(i for i in range(len(values)) if i not in pruned.get(name, ()))
            for name, values in importance.items()
        },
        added={name: given.get(name, 0) for name in importance},
        pruned=pruned,
        spare=unspent if receivers else limits.spare,
        lost=0 if receivers else freed,
    )
