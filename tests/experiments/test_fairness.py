import math
from dataclasses import replace

import pytest
from outcomes import outcome

from loralloc.experiments.fairness import (
    MOST_WIDER,
    NUM_TRIALS,
    Search,
    first_trials,
    off_budget,
    search_rates,
    unequal_steps,
)


@pytest.fixture(scope="module")
def grid(make):
    return make(methods=("lora", "p-tuning-v2"), tasks=("rte",), seeds=(3, 4))


def searched(grid, loss):
    """A search in which a cell has the development loss that a function gives, and its rounds."""
    rounds = []

    def carry_out(cells):
        rounds.append(cells)
        return iter([outcome(cell, dev_loss=loss(cell)) for cell in cells])

    return search_rates(grid, carry_out), rounds


def test_every_method_has_as_many_trials_around_a_rate_of_its_own(grid):
    trials = {}
    for cell in first_trials(grid):
        assert (cell.seed, cell.test) == (3, None)
        trials.setdefault((cell.method, cell.rank), []).append(cell.learning_rate)
    assert {len(rates) for rates in trials.values()} == {NUM_TRIALS}
    assert trials["lora", 8] == [5e-05, 0.00016, 0.0005, 0.0016, 0.005]
    assert trials["p-tuning-v2", 8][2] == 7e-3
    assert set(trials) == {("p-tuning-v2", 8), *(("lora", rank) for rank in (4, 8, 16, 32))}


def test_an_optimum_inside_ends_the_search(grid):
    searches, rounds = searched(grid, lambda cell: abs(math.log(cell.learning_rate / 0.0016)))
    assert searches["rte", "lora", 8].best == 0.0016
    assert not searches["rte", "lora", 8].is_at_edge
    assert {cell.method for cell in rounds[-1]} <= {"p-tuning-v2", "lora"}


@pytest.mark.parametrize(("optimum", "found"), [(0.02, 0.016), (1.7e-5, 1.6e-5)])
def test_an_optimum_at_an_edge_is_widened(grid, optimum, found):
    searches, rounds = searched(grid, lambda cell: abs(math.log(cell.learning_rate / optimum)))
    assert searches["rte", "lora", 8].best == found
    assert not searches["rte", "lora", 8].is_at_edge
    assert len(searches["rte", "lora", 8].losses) == NUM_TRIALS + 2
    assert len(rounds) > 1


def test_widening_ends_and_the_edge_is_told(grid):
    searches, _ = searched(grid, lambda cell: -cell.learning_rate)
    search = searches["rte", "lora", 8]
    assert len(search.losses) == NUM_TRIALS + MOST_WIDER
    assert search.is_at_edge


def test_a_trial_that_fails_or_has_no_loss_is_never_the_best(grid):
    def carry_out(cells):
        return iter(
            [
                outcome(cell, failure="it broke")
                if cell.learning_rate < 1e-4
                else outcome(cell, dev_loss=math.nan if cell.learning_rate > 1e-3 else 2.0)
                for cell in cells
            ]
        )

    search = search_rates(grid, carry_out)["rte", "lora", 8]
    assert search.best == 0.00016
    assert search.failures == {5e-05: "it broke"}


def test_a_search_in_which_all_fail_is_not_widened():
    search = Search(losses={1e-4: math.inf, 1e-3: math.inf})
    assert search.failed
    assert search.next_rate() is None


def test_parameters_and_steps_are_held_against_the_rest(grid):
    cells = grid.at_one_rate("paper", {})
    result = outcome(cells[0]).result
    assert off_budget(result) == 0
    more = {**result, "parameters": {"budget": 100, "trained": 120, "stored": 102}}
    assert off_budget(more) == pytest.approx(0.02)
    free = {**result, "parameters": {"budget": None, "trained": 120, "stored": 102}}
    assert off_budget(free) is None
    searching = {**result, "max_steps": 20, "search_steps": 4}
    found = {"a": result, "b": searching, "c": {**result, "max_steps": 9}}
    assert unequal_steps(found) == ["c"]
    assert replace(cells[0], rank=4).group != cells[0].group
