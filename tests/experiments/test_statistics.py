import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import paired

from loralloc.experiments.statistics import (
    Comparison,
    compare,
    equivalent_rank,
    paired_t,
    sign_flip,
    spread,
)

DIFFERENCES = st.lists(st.integers(-4, 4), min_size=2, max_size=8)


@given(DIFFERENCES)
def test_signs_are_flipped_as_in_the_definition(values):
    found = sign_flip(np.array(values, dtype=float))
    assert found == pytest.approx(paired.sign_flip(values))


@given(DIFFERENCES.filter(lambda values: len(set(values)) > 1))
def test_students_test_is_as_in_the_definition(values):
    assert paired_t(np.array(values, dtype=float)) == pytest.approx(paired.paired_t(values))


def test_students_test_without_a_spread_or_a_second_seed():
    assert paired_t(np.array([1.0])) is None
    assert paired_t(np.array([0.0, 0.0])) == 1.0
    assert paired_t(np.array([2.0, 2.0])) == 0.0


def test_many_examples_are_drawn_and_the_same_every_time():
    rng = np.random.default_rng(0)
    told, chance = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
    assert sign_flip(told) < 0.001
    assert sign_flip(chance) > 0.05
    assert sign_flip(chance) == sign_flip(chance)


def test_a_spread_is_median_mean_and_an_interval_around_it():
    found = spread([80.0, 84.0, 90.0])
    assert (found.median, found.mean) == (84.0, pytest.approx(254 / 3))
    half = 4.302653 * statistics.stdev(found.values) / 3**0.5  # of two degrees of freedom
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), rel=1e-6)
    assert spread([80.0]).interval is None
    assert spread([80.0, 80.0]).interval == (80.0, 80.0)


def test_seeds_are_paired_and_examples_averaged_over_them():
    ours, theirs = {0: 3.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 1.0}
    of_examples = ({0: [1, 0], 1: [1, 1], 7: [0, 0]}, {0: [0, 0], 1: [0, 1]})
    found = compare(ours, theirs, examples=of_examples)
    assert found.difference == pytest.approx(1.5)
    assert found.half_width == pytest.approx(12.706205 * 0.5)  # of one degree of freedom
    assert found.p_seeds == pytest.approx(paired.paired_t([2.0, 1.0]))
    assert found.p_examples == pytest.approx(paired.sign_flip([1.0, 0.0]))
    assert (found.num_seeds, found.num_examples) == (2, 2)
    assert compare({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("p_seeds", "p_examples", "noise"),
    [
        (0.01, 0.01, False),
        (0.01, None, False),
        (0.2, 0.01, True),
        (0.01, 0.2, True),
        (None, 0.01, True),
    ],
)
def test_a_difference_is_told_only_where_seeds_and_examples_tell_it(p_seeds, p_examples, noise):
    found = Comparison(
        difference=1.0,
        half_width=None,
        p_seeds=p_seeds,
        p_examples=p_examples,
        num_seeds=3,
        num_examples=9,
    )
    assert found.is_noise is noise


LADDER = {2: 1.0, 4: 0.8, 8: 0.7, 16: 0.7}


@pytest.mark.parametrize(
    ("loss", "rank"),
    [(1.1, "under 2"), (1.0, "2"), (0.9, "2.8"), (0.8, "4"), (0.7, "8"), (0.69, "over 16")],
)
def test_the_lora_rank_with_the_same_loss(loss, rank):
    assert equivalent_rank(loss, LADDER) == rank


def test_a_ladder_that_does_not_fall_is_made_to():
    assert equivalent_rank(0.85, {2: 1.0, 4: 0.8, 8: 0.9}) == "4"
