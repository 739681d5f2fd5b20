"""Which ranks to prune and who receives them: pure functions on numbers.

Imports torch and the standard library, nothing else. Modules are given by name, and the order of
the names is the order of the model: it breaks every tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

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

    worth: Mapping[str, Tensor] = field(default_factory=dict)
    """What the next ranks of a module are worth, descending, for the policy "worth": the largest
    singular values of dL/dW that its ranks do not explain; empty where no policy reads them."""

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
        values = (x for of in (*self.terms.values(), self.worth) for x in of.values())
        return all(map(math.isfinite, measured)) and all(bool(x.isfinite().all()) for x in values)

    def check(self, num_ranks: Mapping[str, int], *, name: str) -> None:
        """Refuse scores that are not of these ranks.

        Args:
            num_ranks: The rank of every module, in model order.
            name: Of the score that gave them, for the message.

        Raises:
            ValueError: A term is missing, or is not a tensor of shape (num_ranks,) for every
                module.
        """
        who = f"The score {name!r} gave"
        if not self.terms:
            raise ValueError(f"{who} no term; a rank's importance is the sum of one or more.")
        for measured in (self.s_full, self.s_base):
            if measured is not None and not isinstance(measured, (int, float)):
                raise ValueError(
                    f"{who} a {type(measured).__name__} as `s_full` or `s_base`; give a number, or "
                    "None where it was not measured."
                )
        for term, by_module in self.terms.items():
            if list(by_module) != list(num_ranks):
                odd = sorted({*by_module} ^ {*num_ranks})
                why = f"{odd[0]} is in one of the two only" if odd else "the order differs"
                raise ValueError(
                    f"{who} a term {term!r} that has not the adapter's modules in model order "
                    f"({why}); give one tensor for every module of `weights_b`, in its order."
                )
            for module, values in by_module.items():
                wanted = (num_ranks[module],)
                if not isinstance(values, Tensor) or not values.is_floating_point():
                    has = values.dtype if isinstance(values, Tensor) else type(values).__name__
                    raise ValueError(
                        f"{who} {has} as {term!r} of {module}; give a tensor of floats of shape "
                        f"{wanted}."
                    )
                if values.shape != wanted:
                    raise ValueError(
                        f"{who} a tensor of shape {tuple(values.shape)} as {term!r} of {module}, "
                        f"which has {wanted[0]} ranks; give one of shape {wanted}."
                    )


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

    young: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Ranks that have trained for fewer steps than the first ones had at the first round, by
    module: what was measured of them cannot be compared with the others as it is."""

    cost: Mapping[str, int] = field(default_factory=dict)
    """What one rank of a module costs, in units of the budget; 1 where a module is missing."""

    spare: int = 0
    """Units of the budget that earlier rounds could not spend."""

    experts: Mapping[str, int] = field(default_factory=dict)
    """How many columns of B one rank has, by module, where that is not one: a column of each
    expert, column k E + e being rank k's of expert e (see `allocation/experts.py`)."""

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

    def check(self, num_ranks: Mapping[str, int], *, name: str) -> None:
        """Refuse a plan that is not one of these ranks.

        Args:
            num_ranks: The rank of every module before the plan.
            name: Of the policy that made it, for the message.

        Raises:
            ValueError: A module is missing, a rank is not in one of `kept` and `pruned`, or no rank
                would be left.
        """
        who = f"The policy {name!r} made a plan that"
        for what in ("kept", "added"):
            odd = sorted({*getattr(self, what)} ^ {*num_ranks})
            if odd:
                raise ValueError(
                    f"{who} does not have every module of the adapter and no other in `{what}` "
                    f"({odd[0]}); name each module of the scores."
                )
        for module, rank in num_ranks.items():
            kept, pruned = list(self.kept[module]), list(self.pruned.get(module, ()))
            if kept != sorted(kept) or sorted([*kept, *pruned]) != list(range(rank)):
                raise ValueError(
                    f"{who} keeps {kept} and prunes {pruned} of the {rank} ranks of {module}; put "
                    "every index from 0 into one of the two, ascending."
                )
            added = self.added[module]
            if isinstance(added, bool) or not isinstance(added, int) or added < 0:
                raise ValueError(
                    f"{who} adds {added!r} ranks to {module}; give a whole number from 0."
                )
        if not any(map(self.rank_after, num_ranks)):
            raise ValueError(f"{who} leaves no rank; keep at least one.")


class Policy(Protocol):
    """What decides a round: `plan`, or a function of your own with its signature.

    A pure function, for a score may ask it more than once in a round.
    """

    def __call__(self, scores: Scores, limits: Limits, /) -> Plan:
        """Who is pruned and who receives."""


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

    Returns:
        For every module the ranks that stay, how many it loses and how many it is given.

    Example:
        >>> of = {"q_proj": torch.tensor([0.9, 0.1]), "v_proj": torch.tensor([0.5, 0.6])}
        >>> decided = plan(Scores(terms={"importance": of}), Limits(num_pruned=1))
        >>> decided.pruned, decided.added
        ({'q_proj': (1,)}, {'q_proj': 0, 'v_proj': 1})
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
        kept=kept_of(importance, pruned),
        added={name: given.get(name, 0) for name in importance},
        pruned=pruned,
        spare=unspent if receivers else limits.spare,
        lost=0 if receivers else freed,
    )


def kept_of(
    importance: Mapping[str, Tensor], pruned: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Indices of the ranks that stay, for every module.

    Args:
        importance: A tensor of shape (num_ranks,) for each module.
        pruned: Indices of the ranks that go, for the modules that lose any.
    """
    return {
        name: tuple(i for i in range(len(values)) if i not in pruned.get(name, ()))
        for name, values in importance.items()
    }


def distances_to_cut(
    importance: Mapping[str, Tensor], pruned: Mapping[str, tuple[int, ...]], limits: Limits
) -> dict[tuple[str, int], float]:
    """How far each rank's importance would have to move for the pruned set to change.

    Exact where the lowest of one pool are pruned. Where a policy has another rule, a rank that
    lies on the wrong side of the pool's cut has distance 0: nothing can be said for it.

    Args:
        importance: A tensor of shape (num_ranks,) for each module.
        pruned: What the policy prunes of it, as in `Plan.pruned`.
        limits: Its `min_rank` and `protected` are read.

    Returns:
        A distance of at least 0 by (module, index), for every rank whose fate is open: neither
        protected nor in a module that `min_rank` closes to pruning.
    """
    values = {name: scores.tolist() for name, scores in importance.items()}
    left = {name: len(scores) - len(pruned.get(name, ())) for name, scores in values.items()}
    is_open = {name: left[name] > limits.min_rank for name in values}
    lost = {name: [values[name][i] for i in gone] for name, gone in pruned.items() if gone}
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
    return {rank: max(d, 0.0) for rank, d in distance.items() if d < math.inf}
