"""How far an adapter can shrink: pure functions on values, for `methods.shrink`.

Two sizes are compared on the same held-out examples, so that what makes an example hard is in both
losses and falls out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.policy import Limits, Plan, Scores, choose_pruned
from loralloc.allocation.record import Record
from loralloc.allocation.schedule import Schedule, place_rounds, spread

FIRST, LAST = 0.5, 0.85
"""Shares of a run between which sizes are tried. Before, a loss that stands still may only not have
begun to fall (as that of QNLI does for a third of a run of 300 steps); after, what is left needs
the time to recover."""

SHARES = (1.0, 0.5, 0.25)
"""Parts of `prune_share` that a round tries, until one costs nothing."""

NEGLIGIBLE = 0.01
"""Share of the loss that the rounds of a run may cost together. Chosen, not measured: on the same
weights the error of a difference is small, and what is surely above it need not matter."""


class Difference(NamedTuple):
    """How much worse one size is than another, on the same examples."""

    mean: float
    """Difference of the mean losses over all targets; above 0 where the second is worse."""

    standard_error: float
    """Its standard error, from how examples differ among each other."""


def paired_difference(before: Tensor, after: Tensor, counts: Tensor) -> Difference:
    """Compare two models by their losses on the same examples.

    With d_i the difference of example i's summed losses and n_i its targets, the difference of the
    mean losses is the ratio D = sum d_i / sum n_i, and its standard error that of a ratio of sums,

        sqrt( n / (n - 1) sum (d_i - D n_i)^2 ) / sum n_i

    which for examples of one target each is the paired standard error of a mean.

    Args:
        before: Summed loss of each example under the first model, of shape (num_examples,).
        after: The same under the second.
        counts: Targets of each example; same shape, some above 0.

    Returns:
        D and its standard error; the latter is infinite for a single example, of which nothing is
        known.
    """
    d, n = (after - before).double(), counts.double()
    mean = float(d.sum() / n.sum())
    num_examples = len(d)
    if num_examples < 2:
        return Difference(mean, math.inf)
    squares = float(((d - mean * n) ** 2).sum()) * num_examples / (num_examples - 1)
    return Difference(mean, math.sqrt(squares) / float(n.sum()))


def is_as_good(
    difference: Difference, tolerance: float | None, *, loss: float, spent: float = 0.0
) -> bool:
    """Whether ranks may go.

    Args:
        difference: What that costs.
        tolerance: What all rounds together may cost; None for `NEGLIGIBLE` of the loss, or in each
            one standard error, where that is more.
        loss: Before.
        spent: What the rounds before cost together.
    """
    return difference.mean <= _counted_as_none(difference, tolerance, loss, max(0.0, spent))


def still_falls(difference: Difference, tolerance: float | None, *, loss: float) -> bool:
    """Whether training lowered the loss since the last look, by more than what counts as nothing.

    Then what a smaller adapter would have learnt more slowly cannot be seen yet.

    Args:
        difference: From the last look to now.
        tolerance: As above.
        loss: At the last look.
    """
    return difference.mean < -_counted_as_none(difference, tolerance, loss)


def _counted_as_none(
    difference: Difference, tolerance: float | None, loss: float, spent: float = 0.0
) -> float:
    if tolerance is not None:
        return tolerance - spent
    return max(difference.standard_error, NEGLIGIBLE * loss - spent)


def num_to_prune(num_ranks: int, share: float) -> int:
    """Ranks that a round prunes: a share, at least one, and never all."""
    return min(max(1, round(share * num_ranks)), num_ranks - 1)


def share_towards(target: int, parameters: int, rounds_left: int) -> float:
    """The share of the parameters to prune, so that equal shares reach a target in time.

    Args:
        target: Parameters to end with.
        parameters: Parameters now.
        rounds_left: Rounds until the end, this one among them; at least 1.
    """
    return max(0.0, 1 - math.pow(target / parameters, 1 / rounds_left))


def prune(scores: Scores, limits: Limits, *, costs: Mapping[str, int], least: int = 0) -> Plan:
    """A policy that prunes the lowest ranks of one pool, and gives nothing.

    Args:
        scores: Importance of every rank.
        limits: Its `num_pruned`, `min_rank` and `protected` are read.
        costs: Parameters of a rank, by module.
        least: No further rank goes once so many parameters, or fewer, are left.
    """
    importance = scores.importance
    pruned = choose_pruned(importance, limits)
    if least:
        pruned = _down_to(least, pruned, importance, costs)
    return Plan(
        kept={
            name: tuple(i for i in range(len(values)) if i not in pruned.get(name, ()))
            for name, values in importance.items()
        },
        added=dict.fromkeys(importance, 0),
        pruned=pruned,
    )


def _down_to(
    least: int,
    pruned: Mapping[str, tuple[int, ...]],
    importance: Mapping[str, Tensor],
    costs: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The lowest of the ranks to prune, as many as it takes."""
    left = sum(costs[name] * len(values) for name, values in importance.items())
    order = list(importance)
    ranked = sorted(
        (float(importance[name][index]), order.index(name), index)
        for name, gone in pruned.items()
        for index in gone
    )
    chosen: dict[str, list[int]] = {}
    for _, place, index in ranked:
        if left <= least:
            break
        left -= costs[order[place]]
        chosen.setdefault(order[place], []).append(index)
    return {name: tuple(sorted(chosen[name])) for name in order if name in chosen}


def place_sizes(config: AllocationConfig, *, steps_per_epoch: int, max_steps: int) -> Schedule:
    """Choose the steps of the rounds: where `rounds_at` puts them, or spread over the run.

    Args:
        config: Its `num_rounds` and `rounds_at` are read.
        steps_per_epoch: Optimiser steps of one epoch.
        max_steps: Optimiser steps of the whole run.

    Raises:
        ValueError: The run has no step before its last one, or a place does not fit.
    """
    if config.rounds_at is not None or max_steps < 2:
        return place_rounds(config, steps_per_epoch=steps_per_epoch, max_steps=max_steps)
    wanted, places = config.num_rounds, spread(config.num_rounds, max_steps, first=FIRST, last=LAST)
    if len(places) == wanted:
        return Schedule(steps=places)
    note = f"the run has {max_steps} steps, in which {len(places)} of {wanted} rounds have room"
    return Schedule(steps=places, note=note)


def in_words(record: Record) -> str:
    """How small the adapter became, in a sentence or two; empty where none was to shrink.

    Args:
        record: Of the whole run.

    Example:
        >>> in_words(Record.load("runs/sst2-shrink"))  # doctest: +SKIP
        'r = 8 everywhere was 331,776 parameters; 57,600 do as well here: held-out loss 0.3951 at
        the end. 40,320 cost 0.0312 at once.'
    """
    sizes = record.frontier
    if not sizes:
        return ""
    first, last = sizes[0], [size for size in sizes if size.kept][-1]
    ranks = set(record.initial_ranks.values())
    began = f"r = {min(ranks)} everywhere" if len(ranks) == 1 else "The adapter as it began"
    refused = [size for size in sizes if not size.kept]
    if last.parameters == first.parameters and not refused:
        found = (
            f"{began} is {first.parameters:,} parameters, and fewer were not tried, since held-out "
            "loss still fell before every round; train longer, or put `rounds_at` later"
        )
    elif last.parameters == first.parameters:
        found = f"{began} is {first.parameters:,} parameters, and none fewer did as well here"
    elif record.config.get("target_parameters") is not None:
        found = f"{began} was {first.parameters:,} parameters; {last.parameters:,} are left"
    else:
        found = f"{began} was {first.parameters:,} parameters; {last.parameters:,} do as well here"
    more = ""
    if refused:
        more = f" {refused[-1].parameters:,} cost {refused[-1].worse_by:.4f} at once."
    return f"{found}: held-out loss {last.loss:.4f} at the end.{more}"
