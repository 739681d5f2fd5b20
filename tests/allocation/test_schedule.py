import pytest

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.schedule import round_steps, steps_per_epoch


def steps(*, per_epoch, max_steps, **options):
    config = AllocationConfig(**options)
    return round_steps(config, steps_per_epoch=per_epoch, max_steps=max_steps)


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
    with pytest.raises(ValueError, match="so no round could take place before the last step"):
        steps(per_epoch=10, max_steps=10, num_rounds=1)


def test_too_short_a_run_says_how_many_rounds_fit_and_what_to_do():
    with pytest.raises(ValueError) as error:
        steps(per_epoch=20, max_steps=40)
    assert str(error.value) == (
        "The run has 40 steps of 20 an epoch, but the last round of allocation falls on step 55, "
        "so only 4 of 8 rounds could take place before the last step; train for more than 2.75 "
        "epochs, or lower `num_rounds`, `warmup_epochs` or `recovery_epochs`."
    )


def test_two_rounds_on_one_step_are_refused():
    with pytest.raises(ValueError, match=r"`recovery_epochs` of 0\.1 is less than one optimiser"):
        steps(per_epoch=4, max_steps=100, recovery_epochs=0.1)


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
