"""By what a run compares its evaluations, and how it is optimised, is checked at the start."""

import pytest
from transformers import SchedulerType

from loralloc.runs.checks import check_measure, check_optimizer
from loralloc.runs.run import HEADS
from loralloc.runs.settings import resolve

BEST = {"load_best_model_at_end": True}
EACH = [(head, name) for head in HEADS for name in HEADS[head].measures]


@pytest.mark.parametrize(("head", "name"), EACH)
@pytest.mark.parametrize("prefix", ("", "eval_"))
def test_what_an_evaluation_computes_is_taken(head, name, prefix):
    check_measure(resolve({**BEST, "metric_for_best_model": prefix + name}), HEADS[head])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options",
    [
        BEST,
        {"save_strategy": "best"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
    ],
)
def test_a_measure_that_nothing_computes_is_refused_with_those_there_are(head, options):
    with pytest.raises(ValueError) as refused:
        check_measure(resolve({**options, "metric_for_best_model": "f1"}), HEADS[head])
    assert str(refused.value) == (
        f"`metric_for_best_model` is 'f1', which no evaluation of the {head} head computes; use "
        f"{' or '.join(HEADS[head].measures)}."
    )


def test_a_run_that_compares_nothing_needs_no_measure():
    check_measure(resolve({}), HEADS["lm"])


def test_by_the_loss_alone_nothing_else_is_computed():
    options = {**BEST, "metric_for_best_model": "accuracy", "prediction_loss_only": True}
    with pytest.raises(ValueError, match="computes with `prediction_loss_only`; use loss"):
        check_measure(resolve(options), HEADS["classification"])


@pytest.mark.parametrize(
    ("name", "greater", "way"), [("loss", True, "smaller"), ("accuracy", False, "greater")]
)
def test_a_measure_compared_the_wrong_way_round_is_refused(name, greater, way):
    options = {**BEST, "metric_for_best_model": name}
    check_measure(resolve({**options, "greater_is_better": not greater}), HEADS["classification"])
    with pytest.raises(ValueError, match=f"is {greater}, but a {way} `{name}` is better"):
        check_measure(resolve({**options, "greater_is_better": greater}), HEADS["classification"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_delay": 4}, "`eval_delay` is 4, and the run ends after 3 epochs"),
        (
            {"eval_strategy": "steps", "save_strategy": "steps", "max_steps": 10, "eval_delay": 11},
            "`eval_delay` is 11, and the run ends after 10 steps",
        ),
    ],
)
def test_evaluations_that_all_come_too_late_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        check_measure(resolve({**BEST, **options}), HEADS["lm"])
    check_measure(resolve({**BEST, **options, "eval_delay": 3}), HEADS["lm"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optim_args": "nope"},
            "`optim` 'adamw_torch_fused' cannot be made with `optim_args` 'no",
        ),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "could not convert string to float: 'x'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": '{"nope": 1}'}, "unexpected keyword argument 'nope'"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused_with_the_reason(options, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_optimizer(resolve(options))
    assert "\n" not in str(refused.value)


SHAPES = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_schedule_that_transformers_makes_is_taken(name):
    check_optimizer(resolve({"lr_scheduler_type": name, "lr_scheduler_kwargs": SHAPES.get(name)}))
