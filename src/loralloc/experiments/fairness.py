"""A learning rate for every method, searched with equally many trials, and equal budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loralloc.experiments.cell import Cell
from loralloc.experiments.grid import Grid
from loralloc.experiments.work import Outcome, Result
from loralloc.methods.catalog import get_method, learning_rates

NUM_TRIALS = 5
"""Learning rates of every method's search, by half powers of ten around its own."""

MOST_WIDER = 4
"""Further rates at most, one at a time, where the best one is at an edge."""

TOLERANCE = 0.01
"""By how much of the budget parameters may differ from it."""

Key = tuple[str, str, int]
"""Task, method and rank."""

CarryOut = Callable[[Sequence[Cell]], Iterator[Outcome]]
"""Carries out cells, however."""


@dataclass
class Search:
    """The learning rates that were tried for a method, by development loss."""

    losses: dict[float, float] = field(default_factory=dict)
    """By learning rate; infinite where the run failed or its loss is no number."""

    failures: dict[float, str] = field(default_factory=dict)
    """Why a run failed, by learning rate."""

    @property
    def best(self) -> float:
        """The rate with the lowest loss, the lower one of equals."""
        return min(sorted(self.losses), key=lambda rate: self.losses[rate])

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (min(self.losses), max(self.losses))

    @property
    def failed(self) -> bool:
        """Whether no rate gave a loss."""
        return all(math.isinf(loss) for loss in self.losses.values())

    def next_rate(self) -> float | None:
        """The rate beyond the edge that the best one is at; None where it is at none."""
        if self.failed or not self.is_at_edge or len(self.losses) >= NUM_TRIALS + MOST_WIDER:
            return None
        step = 0.5 if self.best == max(self.losses) else -0.5
        return float(f"{self.best * 10**step:.2g}")


def search_rates(grid: Grid, carry_out: CarryOut) -> dict[Key, Search]:
    """Search every method's learning rate with the first seed, on development loss.

    All methods have the same trials, relative to the rate that is recommended for each. Where
    the best one is at an edge, one rate beyond it is tried, until it is not or `MOST_WIDER` were.

    Args:
        grid: What is compared, on fair terms.
        carry_out: Carries out cells.
    """
    searches = {key: Search() for key in grid.rows("fair")}
    wanted = {key: _first_rates(grid, key) for key in searches}
    while wanted:
        tried = [(key, rate) for key, rates in wanted.items() for rate in rates]
        cells = [_trial(grid, key, rate) for key, rate in tried]
        by_folder = {cell.folder: at for cell, at in zip(cells, tried, strict=True)}
        for outcome in carry_out(cells):
            key, rate = by_folder[outcome.cell.folder]
            searches[key].losses[rate] = _loss(outcome.result)
            if outcome.failure:
                searches[key].failures[rate] = outcome.failure
        beyond = {key: searches[key].next_rate() for key in wanted}
        wanted = {key: [rate] for key, rate in beyond.items() if rate is not None}
    return searches


def first_trials(grid: Grid) -> list[Cell]:
    """The runs that a search begins with."""
    return [
        _trial(grid, key, rate) for key in grid.rows("fair") for rate in _first_rates(grid, key)
    ]


def _first_rates(grid: Grid, key: Key) -> list[float]:
    about = get_method(grid.experiment.variant(key[1]).method).about
    experiment = grid.experiment
    if experiment.half_powers is None:
        return learning_rates(about, experiment.trials or NUM_TRIALS)
    (own,) = learning_rates(about, 1)
    return [float(f"{own * 10 ** (power / 2):.2g}") for power in experiment.half_powers]


def off_budget(result: Result) -> float | None:
    """By what share the parameters of a run that is over differ from its budget; None without."""
    budget = result["parameters"]["budget"]
    return None if budget is None else result["parameters"]["stored"] / budget - 1


def unequal_steps(results: Mapping[str, Result]) -> list[str]:
    """Names of the runs that were to take another number of steps than most.

    A method that searches does so on top of the steps that train what it found.
    """
    planned = {
        name: result["max_steps"] - result["search_steps"] for name, result in results.items()
    }
    counts = list(planned.values())
    usual = max(set(counts), key=counts.count, default=0)
    return [name for name, steps in planned.items() if steps != usual]


def _trial(grid: Grid, key: Key, rate: float) -> Cell:
    task, method, rank = key
    return grid.cell(
        task=task,
        method=method,
        rank=rank,
        seed=grid.seeds[0],
        learning_rate=rate,
        terms="fair",
        tested=False,
    )


def _loss(result: Result | None) -> float:
    loss = math.inf if result is None else float(result["dev_loss"])
    return loss if math.isfinite(loss) else math.inf
