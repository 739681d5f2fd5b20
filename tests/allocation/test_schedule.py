from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.schedule import MIN_GAP, place_rounds, steps_per_epoch


def placed(*, per_epoch, max_steps, **options):
    config = AllocationConfig(**options)
    return place_rounds(config, steps_per_epoch=per_epoch, max_steps=max_steps)


def steps(**run):
    schedule = placed(**run)
    assert schedule.note == ""
    return list(schedule.steps)


# The paper's places.


def test_the_papers_rounds_start_after_one_epoch_and_follow_every_quarter():
    assert steps(per_epoch=20, max_steps=200) == [20, 25, 30, 35, 40, 45, 50, 55]


def test_a_round_falls_on_the_nearest_step():
    # After 0.3, 0.7, 1.1 and 1.5 epochs of 9 steps: 2.7, 6.3, 9.9 and 13.5.
    options = dict(warmup_epochs=0.3, recovery_epochs=0.4, num_rounds=4)
    assert steps(per_epoch=9, max_steps=100, **options) == [3, 6, 10, 14]


def test_no_round_comes_before_the_first_step():
    assert steps(per_epoch=10, max_steps=5, warmup_epochs=0.001, num_rounds=1) == [1]


def test_the_last_round_must_leave_a_step_to_train_its_ranks():
    assert steps(per_epoch=10, max_steps=11, num_rounds=1) == [10]
    assert placed(per_epoch=10, max_steps=10, num_rounds=1).note


# A run that is too short for them.


def test_one_epoch_with_default_options_spreads_its_rounds_and_says_so():
    schedule = placed(per_epoch=120, max_steps=120)
    assert schedule.steps == (12, 20, 29, 37, 46, 54, 63, 72)
    assert schedule.note == (
        "8 rounds need more than 2.75 epochs and the run has 1: they are spread over steps 12 to 72"
    )


@pytest.mark.parametrize(
    ("run", "found", "note"),
    [
        (
            dict(per_epoch=20, max_steps=40),
            (4, 8, 12, 16, 20, 24),
            "8 rounds need more than 2.75 epochs and the run has 2: 6 of them are spread over "
            "steps 4 to 24",
        ),
        (
            dict(per_epoch=100, max_steps=3),
            (1,),
            "8 rounds need more than 2.75 epochs and the run has 0.03: one takes place after "
            "step 1",
        ),
        (
            dict(per_epoch=20, max_steps=40, num_rounds=1, warmup_epochs=5),
            (4,),
            "1 round needs more than 5 epochs and the run has 2: it takes place after step 4",
        ),
        (
            dict(per_epoch=4, max_steps=100, num_rounds=3, recovery_epochs=0.1),
            (10, 35, 60),
            "3 rounds need a step each and 0.1 epochs of 4 steps are less than one: they are "
            "spread over steps 10 to 60",
        ),
    ],
)
def test_what_was_done_and_why_is_said(run, found, note):
    assert (placed(**run).steps, placed(**run).note) == (found, note)


@given(
    per_epoch=st.integers(1, 200),
    max_steps=st.integers(2, 400),
    num_rounds=st.integers(1, 20),
    warmup_epochs=st.floats(0.01, 3),
    recovery_epochs=st.floats(0.01, 1),
)
def test_rounds_always_fit_and_are_spread_only_where_the_papers_places_do_not(
    per_epoch, max_steps, num_rounds, warmup_epochs, recovery_epochs
):
    schedule = placed(
        per_epoch=per_epoch,
        max_steps=max_steps,
        num_rounds=num_rounds,
        warmup_epochs=warmup_epochs,
        recovery_epochs=recovery_epochs,
    )
    found = schedule.steps
    papers = [
        max(1, round((warmup_epochs + recovery_epochs * k) * per_epoch)) for k in range(num_rounds)
    ]
    fit = papers[-1] < max_steps and len(set(papers)) == num_rounds
    assert (schedule.note == "") is fit
    if fit:
        assert list(found) == papers
        return
    assert found[0] == max(1, round(0.1 * max_steps))
    assert 1 <= len(found) <= num_rounds
    assert found[-1] < max_steps and found[-1] <= max(found[0], 0.6 * max_steps)
    gaps = [after - before for before, after in pairwise(found)]
    assert all(gap >= MIN_GAP for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    room = int(0.6 * max_steps) - found[0]
    assert len(found) == num_rounds or room < len(found) * MIN_GAP


def test_a_run_of_one_step_is_refused():
    with pytest.raises(ValueError, match=r"The run has 1 step, .*; train for 2 steps or more\."):
        placed(per_epoch=1, max_steps=1)


# Places of one's own.


def test_places_are_shares_of_the_run_or_steps():
    assert steps(per_epoch=10, max_steps=200, rounds_at=(0.1, 0.25, 0.5)) == [20, 50, 100]
    assert steps(per_epoch=10, max_steps=200, rounds_at=[7, 30]) == [7, 30]
    assert steps(per_epoch=10, max_steps=200, rounds_at=[0.001]) == [1]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            [20, 60],
            "`rounds_at` ends with 60, which is step 60, but the run has 60 steps, and a round "
            "comes before the last one; name an earlier place or train for longer.",
        ),
        ([0.1, 0.999], "`rounds_at` ends with 0.999, which is step 60, but the run has 60 steps"),
        (
            [0.5, 0.501],
            "`rounds_at` has the places 0.5 and 0.501, which are both step 30 of 60; leave out "
            "one of the two.",
        ),
    ],
)
def test_places_of_ones_own_are_never_moved(places, words):
    with pytest.raises(ValueError) as error:
        placed(per_epoch=10, max_steps=60, rounds_at=places)
    assert words in str(error.value)


# Epochs.


@pytest.mark.parametrize(
    ("num_examples", "options", "expected"),
    [
        (1000, dict(batch_size=16), 63),
        (1000, dict(batch_size=16, accumulation_steps=4), 16),  # 62.5 batches, 15.75 steps
        (1000, dict(batch_size=16, accumulation_steps=4, num_processes=2), 8),
        (3, dict(batch_size=16, accumulation_steps=4), 1),
    ],
)
def test_an_epoch_ends_with_the_last_incomplete_batch(num_examples, options, expected):
    assert steps_per_epoch(num_examples, **options) == expected
