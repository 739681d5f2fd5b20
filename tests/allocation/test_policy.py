import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import policy as reference

from loralloc.allocation.policy import Limits, Scores, choose_pruned, distances_to_cut, plan

NAMES = ("a", "b", "c", "d", "e")


def scores_of(importance: dict[str, list[float]]) -> Scores:
    only = {name: torch.tensor(values, dtype=torch.float64) for name, values in importance.items()}
    without = {name: torch.zeros_like(values) for name, values in only.items()}
    return Scores(terms={"without": without, "only": only}, s_full=0.0, s_base=0.0)


def plan_of(importance, **limits):
    return plan(scores_of(importance), Limits(**limits))


def given_out(decided):
    return {name: count for name, count in decided.added.items() if count}


# Worked by hand.


def test_footnote_4_eight_ranks_over_three_receivers_give_3_3_2():
    importance = {"x": [5, 7], "y": [9, 9], "low": [0] * 10, "z": [8, 8]}
    decided = plan_of(importance, num_pruned=8)
    assert decided.pruned == {"low": tuple(range(8))}
    assert given_out(decided) == {"x": 2, "y": 3, "z": 3}  # means 6, 9 and 8
    assert decided.kept["low"] == (8, 9)


def test_all_modules_compete_in_one_pool():
    decided = plan_of({"a": [1, 9], "b": [2, 3], "c": [8, 4]}, num_pruned=3)
    assert decided.pruned == {"a": (0,), "b": (0, 1)}
    assert given_out(decided) == {"c": 3}
    assert [decided.rank_after(name) for name in "abc"] == [1, 0, 5]


def test_a_module_that_lost_a_rank_receives_none_even_with_the_highest_mean():
    decided = plan_of({"a": [0, 100], "b": [1, 1]}, num_pruned=1)
    assert given_out(decided) == {"b": 1}


def test_both_terms_of_importance_count():
    without = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([2.0, 2.0])}
    only = {"a": torch.tensor([3.0, -2.0]), "b": torch.tensor([0.0, 0.0])}
    decided = plan(
        Scores(terms={"without": without, "only": only}, s_full=0.0, s_base=0.0),
        Limits(num_pruned=1),
    )
    assert decided.pruned == {"a": (1,)}  # 0 + 3, 3 - 2, 2 + 0, 2 + 0


def test_ties_are_pruned_in_module_order_then_by_index():
    importance = {"b": [1, 1], "a": [1, 1]}
    assert choose_pruned(scores_of(importance).importance, Limits(num_pruned=3)) == {
        "b": (0, 1),
        "a": (0,),
    }


def test_ties_of_the_mean_receive_in_module_order():
    importance = {"d": [2, 4], "low": [0, 0, 0], "c": [3, 3], "b": [1, 5]}
    assert given_out(plan_of(importance, num_pruned=1)) == {"d": 1}
    assert given_out(plan_of(importance, num_pruned=2)) == {"d": 1, "c": 1}


def test_without_a_receiver_the_budget_is_lost():
    decided = plan_of({"a": [0, 9], "b": [1, 9]}, num_pruned=2, spare=3)
    assert decided.added == {"a": 0, "b": 0}
    assert (decided.lost, decided.spare) == (2, 3)


def test_a_module_of_rank_0_never_receives():
    decided = plan_of({"a": [0, 9], "gone": [], "b": [9, 9]}, num_pruned=1)
    assert given_out(decided) == {"b": 1}
    assert decided.kept["gone"] == ()
    # Alone it is no receiver either.
    assert plan_of({"a": [0, 9], "gone": []}, num_pruned=1).lost == 1


def test_min_rank_closes_a_module():
    decided = plan_of({"a": [0, 1, 2], "b": [7, 8, 9]}, num_pruned=3, min_rank=2)
    assert decided.pruned == {"a": (0,), "b": (0,)}
    assert decided.lost == 2


def test_protected_ranks_stay_and_the_next_go():
    decided = plan_of(
        {"a": [0, 1, 2], "b": [7, 8, 9]}, num_pruned=2, protected={"a": frozenset({0, 2})}
    )
    assert decided.pruned == {"a": (1,), "b": (0,)}


def test_what_max_rank_leaves_over_is_spare():
    decided = plan_of({"a": [0, 0, 0, 9], "b": [9], "c": [8, 8]}, num_pruned=3, max_rank=2)
    assert given_out(decided) == {"b": 1}
    assert (decided.spare, decided.lost) == (2, 0)


def test_a_budget_in_parameters_buys_fewer_dear_ranks_and_carries_the_rest():
    cost = {"cheap": 2, "dear": 5}
    decided = plan_of({"cheap": [0, 0, 0, 0], "dear": [9]}, num_pruned=4, cost=cost, spare=1)
    assert given_out(decided) == {"dear": 1}  # 4 * 2 + 1 = 9 buy one of 5
    assert decided.spare == 4


def test_a_receiver_that_is_too_dear_leaves_its_turn_to_the_next():
    cost = {"low": 2, "dear": 5, "cheap": 2}
    decided = plan_of({"low": [0, 0], "dear": [9], "cheap": [8]}, num_pruned=2, cost=cost)
    assert given_out(decided) == {"cheap": 2}
    assert decided.spare == 0


# For every round.

SMALL = st.integers(-3, 3)  # so that ties are common


@st.composite
def rounds(draw, *, elements=SMALL):
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    importance = {
        name: draw(st.lists(elements, min_size=size, max_size=size))
        for name, size in zip(NAMES, sizes, strict=False)
    }
    limits = dict(
        num_pruned=draw(st.integers(0, 12)),
        min_rank=draw(st.integers(0, 3)),
        max_rank=draw(st.none() | st.integers(1, 8)),
        protected={name: draw(st.frozensets(st.integers(0, 4), max_size=3)) for name in importance},
        cost=draw(st.just({}) | st.fixed_dictionaries({n: st.integers(1, 6) for n in importance})),
        spare=draw(st.integers(0, 9)),
    )
    return importance, limits


def price(name, limits):
    return limits["cost"].get(name, 1)


@given(rounds())
def test_equals_the_paper_one_rank_at_a_time(case):
    importance, limits = case
    decided, paper = plan_of(importance, **limits), reference.plan(importance, **limits)
    assert {name: set(decided.pruned.get(name, ())) for name in importance} == paper.pruned
    assert decided.added == paper.added
    assert (decided.spare, decided.lost) == (paper.spare, paper.lost)


@given(rounds())
def test_kept_and_pruned_are_all_there_was(case):
    importance, limits = case
    decided = plan_of(importance, **limits)
    for name, values in importance.items():
        both = (*decided.kept[name], *decided.pruned.get(name, ()))
        assert sorted(both) == list(range(len(values)))
        assert list(decided.kept[name]) == sorted(decided.kept[name])
    assert all(decided.pruned.values())


@given(rounds())
def test_nothing_of_the_budget_appears_or_vanishes(case):
    importance, limits = case
    decided = plan_of(importance, **limits)
    before = sum(price(name, limits) * len(values) for name, values in importance.items())
    after = sum(price(name, limits) * decided.rank_after(name) for name in importance)
    assert after + decided.spare + decided.lost == before + limits["spare"]
    assert min(decided.spare, decided.lost) >= 0


@given(rounds())
def test_with_a_receiver_the_total_of_ranks_stays(case):
    importance, limits = case
    limits |= dict(cost={}, max_rank=None, spare=0)
    decided = plan_of(importance, **limits)
    receivers = [n for n, values in importance.items() if values and n not in decided.pruned]
    assume(receivers)
    assert sum(map(decided.rank_after, importance)) == sum(map(len, importance.values()))


@given(rounds())
def test_every_limit_is_kept(case):
    importance, limits = case
    decided = plan_of(importance, **limits)
    assert sum(map(len, decided.pruned.values())) <= limits["num_pruned"]
    for name, values in importance.items():
        if name in decided.pruned:
            assert len(decided.kept[name]) >= limits["min_rank"]
            assert not limits["protected"][name] & set(decided.pruned[name])
            assert decided.added[name] == 0
        if decided.added[name]:
            assert values
            assert limits["max_rank"] is None or decided.rank_after(name) <= limits["max_rank"]


@given(rounds())
def test_equal_receivers_get_equal_shares_to_one_rank(case):
    importance, limits = case
    limits |= dict(cost={}, max_rank=None)
    decided = plan_of(importance, **limits)
    shares = [decided.added[n] for n, v in importance.items() if v and n not in decided.pruned]
    assert max(shares, default=0) - min(shares, default=0) <= 1


@given(rounds(elements=st.floats(-1, 1, width=32)), st.randoms(use_true_random=False))
def test_the_order_of_modules_and_ranks_only_breaks_ties(case, random):
    importance, limits = case
    everything = [score for values in importance.values() for score in values]
    means = [sum(values) / len(values) for values in importance.values() if values]
    assume(len(set(everything)) == len(everything) and len(set(means)) == len(means))
    decided = plan_of(importance, **limits)

    names = random.sample(list(importance), len(importance))
    order = {
        name: random.sample(range(len(importance[name])), len(importance[name])) for name in names
    }
    shuffled = {name: [importance[name][i] for i in order[name]] for name in names}
    protected = {
        name: frozenset(
            new for new, old in enumerate(order[name]) if old in limits["protected"][name]
        )
        for name in names
    }
    again = plan_of(shuffled, **{**limits, "protected": protected})

    for name in names:
        assert {order[name][i] for i in again.kept[name]} == set(decided.kept[name])
    if not limits["cost"]:
        assert again.added == decided.added


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_know_whether_they_are_finite(bad):
    assert scores_of({"a": [1.0], "b": []}).is_finite()
    assert not scores_of({"a": [1.0, bad]}).is_finite()


# How far a rank is from the cut.


@st.composite
def rounds_of_distinct(draw):
    """Distinct whole numbers as importance, so that a half decides between two of them."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    values = draw(st.permutations(range(0, 3 * sum(sizes), 3)))
    importance, start = {}, 0
    for name, size in zip(NAMES, sizes, strict=False):
        importance[name] = torch.tensor(values[start : start + size], dtype=torch.float64)
        start += size
    limits = Limits(
        num_pruned=draw(st.integers(0, sum(sizes) + 1)),
        min_rank=draw(st.integers(0, 3)),
        protected={name: draw(st.frozensets(st.integers(0, 3), max_size=2)) for name in importance},
    )
    return importance, limits


def distances(importance, limits):
    return distances_to_cut(importance, choose_pruned(importance, limits), limits)


def moved(importance, name, index, by):
    changed = {key: values.clone() for key, values in importance.items()}
    changed[name][index] += by
    return changed


@given(rounds_of_distinct())
def test_less_than_its_distance_never_moves_a_rank_over_the_cut(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    for (name, index), distance in distances_to_cut(
        importance, choose_pruned(importance, limits), limits
    ).items():
        assert distance > 0
        for by in (distance - 0.5, 0.5 - distance):
            assert choose_pruned(moved(importance, name, index, by), limits) == pruned


@given(rounds_of_distinct())
def test_more_than_its_distance_moves_a_rank_over_the_cut(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    for (name, index), distance in distances_to_cut(
        importance, choose_pruned(importance, limits), limits
    ).items():
        is_pruned = index in pruned.get(name, ())
        by = distance + 0.5 if is_pruned else -distance - 0.5
        after = choose_pruned(moved(importance, name, index, by), limits)
        assert (index in after.get(name, ())) is not is_pruned


@given(rounds_of_distinct())
def test_a_rank_without_a_distance_decides_nothing(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    to_cut = distances(importance, limits)
    for name, values in importance.items():
        for index in range(len(values)):
            if (name, index) not in to_cut:
                for by in (-1000.0, 1000.0):
                    assert choose_pruned(moved(importance, name, index, by), limits) == pruned


@given(rounds_of_distinct(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_no_error_below_half_the_distances_changes_what_is_pruned(case, random):
    """What screening relies on: it holds for all ranks wrong at once."""
    importance, limits = case
    to_cut = distances(importance, limits)
    error = min(to_cut.values(), default=2.0) / 2 - 0.25
    wrong = {
        name: values + torch.tensor([random.uniform(-error, error) for _ in values])
        for name, values in importance.items()
    }
    assert choose_pruned(wrong, limits) == choose_pruned(importance, limits)


def test_a_rank_on_the_wrong_side_of_the_pools_cut_has_no_distance_to_it():
    """Of a policy with another rule nothing is known but what it prunes."""
    importance = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 9.0])}
    pruned = {"a": (0,), "b": (0,)}
    assert distances_to_cut(importance, pruned, Limits(num_pruned=2)) == {
        ("a", 0): 1.0,
        ("a", 1): 0.0,
        ("b", 0): 0.0,
        ("b", 1): 4.0,
    }
