"""How far an adapter can shrink, on numbers."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import shrinking as reference

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.policy import Limits, Scores
from loralloc.allocation.schedule import spread
from loralloc.allocation.shrinking import (
    FIRST,
    LAST,
    Difference,
    is_as_good,
    num_to_prune,
    paired_difference,
    place_sizes,
    prune,
    share_towards,
)

losses = st.floats(0, 10, allow_subnormal=False)
examples = st.lists(
    st.lists(st.tuples(losses, losses), min_size=1, max_size=4), min_size=2, max_size=8
)


def summed(targets: list[list[float]]) -> torch.Tensor:
    return torch.tensor([sum(of_one) for of_one in targets], dtype=torch.float64)


@given(examples)
def test_the_difference_and_its_error_are_those_of_the_loops(pairs):
    before = [[first for first, _ in of_one] for of_one in pairs]
    after = [[second for _, second in of_one] for of_one in pairs]
    counts = torch.tensor([len(of_one) for of_one in pairs])
    found = paired_difference(summed(before), summed(after), counts)
    assert found == pytest.approx(reference.paired_difference(before, after), abs=1e-9)


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=8))
def test_of_one_target_each_it_is_the_standard_error_of_a_mean(pairs):
    before, after = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    found = paired_difference(before, after, torch.ones(len(pairs)))
    apart = [b - a for a, b in pairs]
    assert found.mean == pytest.approx(statistics.mean(apart), abs=1e-9)
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    assert found.standard_error == pytest.approx(error, abs=1e-9)


@given(examples, st.floats(-3, 3))
def test_how_hard_the_examples_are_falls_out(pairs, shift):
    before = summed([[first for first, _ in of_one] for of_one in pairs])
    counts = torch.tensor([len(of_one) for of_one in pairs])
    found = paired_difference(before, before + shift * counts, counts)
    assert found == pytest.approx((shift, 0.0), abs=1e-6)


def test_of_a_single_example_nothing_is_known():
    one = torch.tensor([2.0])
    assert paired_difference(one, one + 1, torch.ones(1)) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("mean", "tolerance", "goes"),
    [
        (0.1, None, True),  # a standard error
        (0.11, None, False),
        (-5.0, 0.0, True),
        (0.0, 0.0, True),
        (0.2, 0.15, False),
    ],
)
def test_ranks_go_within_the_tolerance(mean, tolerance, goes):
    assert is_as_good(Difference(mean, 0.1), tolerance, loss=1.0) is goes


@pytest.mark.parametrize(
    ("tolerance", "spent", "goes"),
    [
        (0.3, 0.09, True),
        (0.3, 0.11, False),
        (0.3, -5.0, True),
        (None, 0.09, True),
        (None, 0.2, False),
    ],
)
def test_what_rounds_before_cost_is_spent(tolerance, spent, goes):
    found = Difference(0.2, 0.01)
    assert is_as_good(found, tolerance, loss=30.0, spent=spent) is goes


@pytest.mark.parametrize(("mean", "goes"), [(0.029, True), (0.031, False)])
def test_a_hundredth_of_the_loss_need_not_matter_however_sure_it_is(mean, goes):
    assert is_as_good(Difference(mean, 1e-6), None, loss=3.0) is goes


@given(st.integers(1, 5000), st.floats(0.01, 0.99))
def test_a_share_of_the_ranks_goes_but_never_all(num_ranks, share):
    count = num_to_prune(num_ranks, share)
    assert min(1, num_ranks - 1) <= count < num_ranks
    assert abs(count - share * num_ranks) <= 1


@given(st.integers(1, 10), st.integers(10, 10_000), st.floats(0.01, 0.99))
def test_equal_shares_reach_the_target_in_time(rounds, parameters, part):
    target, left = max(1, round(part * parameters)), float(parameters)
    first = share_towards(target, parameters, rounds)
    for number in range(rounds):
        share = share_towards(target, left, rounds - number)
        assert share == pytest.approx(first, abs=1e-6)
        left *= 1 - share
    assert left == pytest.approx(target)


def scores_of(importance) -> Scores:
    return Scores(terms={"all": {n: torch.tensor(x).float() for n, x in importance.items()}})


def test_the_lowest_go_and_nobody_receives():
    decided = prune(
        scores_of({"a": [3, 0], "b": [1, 2, 9]}), Limits(num_pruned=2), costs={"a": 1, "b": 1}
    )
    assert decided.pruned == {"a": (1,), "b": (0,)}
    assert decided.kept == {"a": (0,), "b": (1, 2)}
    assert set(decided.added.values()) == {0} and not decided.lost


def test_on_the_way_to_a_target_no_more_go_than_it_takes():
    costs, importance = {"a": 10, "b": 3}, {"a": [5, 1], "b": [2, 3, 4]}
    # 29 at first; 19 without the first of them, 16 without the next, 13 without the third.
    for least, gone in ((28, 1), (19, 1), (18, 2), (16, 2), (15, 3), (1, 4)):
        decided = prune(scores_of(importance), Limits(num_pruned=4), costs=costs, least=least)
        assert sum(map(len, decided.pruned.values())) == gone, least
    assert decided.kept == {"a": (0,), "b": ()}


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(1, 60),
)
def test_a_target_is_reached_by_the_lowest_alone(values, prices, least):
    importance = {"abcd"[i]: of_one for i, of_one in enumerate(values)}
    costs = dict(zip("abcd", prices, strict=True))
    total = sum(map(len, values))
    decided = prune(scores_of(importance), Limits(num_pruned=total), costs=costs, least=least)
    left = sum(costs[name] * len(kept) for name, kept in decided.kept.items())
    assert left <= least
    gone = [importance[name][i] for name, lost in decided.pruned.items() for i in lost]
    stay = [importance[name][i] for name, kept in decided.kept.items() for i in kept]
    assert not gone or not stay or max(gone) <= min(stay)
    last = [
        (costs[name], importance[name][i]) for name, lost in decided.pruned.items() for i in lost
    ]
    assert not last or left + max(cost for cost, x in last if x == max(gone)) > least


# Where sizes are tried.


@given(st.integers(1, 12), st.integers(2, 5000))
def test_sizes_are_tried_in_order_within_the_run(num_rounds, max_steps):
    rounds = list(spread(num_rounds, max_steps, first=FIRST, last=LAST))
    assert 1 <= len(rounds) <= num_rounds
    assert rounds == sorted(set(rounds)) and rounds[0] >= 1 and rounds[-1] < max_steps
    if max_steps >= 100:
        assert len(rounds) == num_rounds
        assert rounds[0] >= 0.5 * max_steps - 1 and rounds[-1] <= 0.85 * max_steps


@pytest.mark.parametrize(
    ("options", "max_steps", "steps", "note"),
    [
        ({"num_rounds": 3}, 100, (50, 67, 85), ""),
        ({"num_rounds": 8}, 20, (10, 17), "the run has 20 steps, in which 2 of 8 rounds"),
        ({"rounds_at": (0.5, 0.6)}, 10, (5, 6), ""),
    ],
)
def test_rounds_are_spread_or_where_they_are_put(options, max_steps, steps, note):
    found = place_sizes(AllocationConfig(**options), steps_per_epoch=5, max_steps=max_steps)
    assert found.steps == steps
    assert found.note.startswith(note) and bool(found.note) == bool(note)


def test_a_run_of_one_step_has_no_room():
    with pytest.raises(ValueError, match="train for 2 steps or more"):
        place_sizes(AllocationConfig(), steps_per_epoch=1, max_steps=1)
