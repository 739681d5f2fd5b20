"""Giving ranks where the next one is worth most."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.unexplained import buy as bought_one_by_one

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost
from loralloc.allocation.policy import Limits, Scores, choose_pruned
from loralloc.allocation.worth import MOST, num_known, plan

NAMES = ("a", "b", "c", "d")


def scores_of(importance, worth):
    as_tensors = [
        {name: torch.tensor(values, dtype=torch.float64) for name, values in of.items()}
        for of in (importance, worth)
    ]
    return Scores(terms={"only": as_tensors[0]}, worth=as_tensors[1])


def test_each_rank_goes_where_the_next_is_worth_most():
    importance = {"a": [0, 0, 0, 9], "b": [9], "c": [9]}
    worth = {"a": [1, 1], "b": [5, 3], "c": [4, 0.5]}
    decided = plan(scores_of(importance, worth), Limits(num_pruned=3))
    assert decided.pruned == {"a": (0, 1, 2)}
    assert decided.added == {"a": 0, "b": 2, "c": 1}
    # By what a rank costs, b is no longer worth it: 5 and 3 for two units, 4 and 3 for one.
    costly, worth = Limits(num_pruned=3, cost={"b": 2}), {**worth, "c": [4, 3]}
    assert plan(scores_of(importance, worth), costly).added == {"a": 1, "b": 0, "c": 2}


def test_a_module_that_lost_a_rank_may_receive_another_and_an_empty_one_may_not():
    scores = scores_of({"a": [0, 8], "gone": [], "b": [9]}, {"a": [7], "gone": [9], "b": [1]})
    assert plan(scores, Limits(num_pruned=1)).added == {"a": 1, "gone": 0, "b": 0}


def test_what_is_not_known_is_not_bought_and_stays_for_the_next_round():
    scores = scores_of({"a": [0, 0, 0], "b": [9]}, {"a": [], "b": [1, 1]})
    decided = plan(scores, Limits(num_pruned=3, max_rank=2))
    assert decided.added == {"a": 0, "b": 1} and (decided.spare, decided.lost) == (2, 0)
    assert plan(scores_of({"a": [0, 1]}, {}), Limits(num_pruned=1)).spare == 1


@st.composite
def rounds(draw):
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    small = st.integers(0, 3)
    importance = {
        name: draw(st.lists(small, min_size=n, max_size=n))
        for name, n in zip(NAMES, sizes, strict=False)
    }
    worth = {n: sorted(draw(st.lists(small, max_size=4)), reverse=True) for n in importance}
    limits = dict(
        num_pruned=draw(st.integers(0, 10)),
        min_rank=draw(st.integers(0, 2)),
        max_rank=draw(st.none() | st.integers(1, 6)),
        cost=draw(st.just({}) | st.fixed_dictionaries({n: st.integers(1, 5) for n in importance})),
        spare=draw(st.integers(0, 6)),
    )
    return importance, worth, limits


@given(rounds())
@settings(max_examples=300, deadline=None)
def test_equals_buying_one_rank_at_a_time_and_keeps_the_budget(case):
    importance, worth, limits = case
    scores = scores_of(importance, worth)
    decided = plan(scores, Limits(**limits))
    pruned = choose_pruned(scores.importance, Limits(**limits))
    assert decided.pruned == pruned
    cost = limits["cost"]
    freed = sum(cost.get(name, 1) * len(gone) for name, gone in pruned.items())
    left = {n: len(v) - len(pruned.get(n, ())) for n, v in importance.items() if len(v)}
    given_out, unspent = bought_one_by_one(
        freed + limits["spare"], left, worth, cost, limits["max_rank"]
    )
    assert {n: c for n, c in decided.added.items() if c} == {
        n: c for n, c in given_out.items() if c
    }
    assert (decided.spare, decided.lost) == (unspent, 0)
    before = sum(cost.get(name, 1) * len(values) for name, values in importance.items())
    after = sum(cost.get(name, 1) * decided.rank_after(name) for name in importance)
    assert after + decided.spare == before + limits["spare"]


@given(st.integers(1, 500), st.integers(1, 300))
def test_enough_is_known_for_every_rank_to_find_a_module(num_pruned, num_modules):
    known = num_known(num_pruned, num_modules)
    assert known * num_modules >= num_pruned
    assert known <= MOST or known == -(-num_pruned // num_modules)


@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_in_rounds_the_budget_is_kept_and_the_record_says_what_ranks_were_worth(budget):
    model = tiny.adapted(tiny.llama())
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 5, optimizer)
    config = AllocationConfig(policy="worth", budget=budget)
    allocator = Allocator(model, config, [batch])
    cost = {n: rank_cost(x) if budget == "parameters" else 1 for n, x in lora_layers(model).items()}
    total = 4 * sum(cost.values())
    for step in range(3):
        entry = allocator.step(optimizer, step=step)
        tiny.train(model, batch, 1, optimizer)
        assert sum(cost[n] * r for n, r in entry.ranks_after.items()) + entry.spare == total
        assert entry.spare < max(cost.values())
        best = max(entry.worth, key=lambda n: entry.worth[n][0] / cost[n])
        assert best in entry.added
        assert {len(of) for of in entry.worth.values()} == {7}
