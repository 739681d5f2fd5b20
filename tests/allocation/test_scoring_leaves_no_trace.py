"""Whatever the score, and even when it fails: the model is as it was, bit for bit."""

import functools

import pytest
import tiny
import torch

from loralloc.allocation.importance import ablation, gradient, screened, shapley
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits

SCORES = {
    "ablation": ablation.score,
    "gradient": gradient.score,
    "screened": functools.partial(screened.score, most=16),
    "shapley": shapley.score,
}
FORWARD_PASSES = {gradient.score: 2, shapley.score: 7}
"""Of one micro-batch, where it is fewer than the failures below are placed at."""

every_score = pytest.mark.parametrize("score", list(SCORES.values()), ids=list(SCORES))


class Interruption(Exception):
    pass


def traces(model):
    """All that scoring could leave behind."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "patches": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
    }


def assert_same(before, after):
    weights, weights_after = before.pop("weights"), after.pop("weights")
    assert after == before
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)


def half_in_training(model):
    """A mixture of modes, as when a user freezes a part in evaluation mode."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    return model


@every_score
@pytest.mark.parametrize("build", [tiny.llama, tiny.bert_classifier])
def test_when_it_succeeds(score, build):
    model = half_in_training(tiny.with_trained_b(tiny.adapted(build(), r=2)))
    objective = Objective(model, tiny.micro_batches(tiny.batch_for(model), 3))
    before = traces(model)
    score(objective, weights_b(lora_layers(model)), Limits(num_pruned=3))
    assert_same(before, traces(model))


@every_score
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3, 9])
def test_when_a_forward_pass_fails(score, calls_before):
    model = half_in_training(tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2)))
    objective = Objective(model, [tiny.batch_for(model)])
    calls = [0]

    def fail_later(*_):
        calls[0] += 1
        if calls[0] > calls_before:
            raise Interruption

    model.get_base_model().model.norm.register_forward_hook(fail_later)
    before = traces(model)
    if calls_before >= FORWARD_PASSES.get(score, 10):
        score(objective, weights_b(lora_layers(model)), Limits(num_pruned=3))
    else:
        with pytest.raises(Interruption):
            score(objective, weights_b(lora_layers(model)), Limits(num_pruned=3))
    assert_same(before, traces(model))


@every_score
def test_dropout_is_off(score):
    model = tiny.with_trained_b(tiny.adapted(tiny.gpt2(resid_pdrop=0.5), r=2, lora_dropout=0.5))
    objective = Objective(model.train(), [tiny.batch_for(model)])
    weights, limits = weights_b(lora_layers(model)), Limits(num_pruned=3)
    first, second = score(objective, weights, limits), score(objective, weights, limits)
    assert first.s_full == second.s_full
    assert all(torch.equal(x, second.importance[name]) for name, x in first.importance.items())


@every_score
def test_gradients_that_are_there_stay(score):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2))
    batch = tiny.batch_for(model)
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    score(Objective(model, [batch]), weights_b(lora_layers(model)), Limits(num_pruned=3))
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_score
def test_the_users_random_numbers_are_left_alone(score):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2))
    before = torch.get_rng_state()
    score(
        Objective(model, [tiny.batch_for(model)]),
        weights_b(lora_layers(model)),
        Limits(num_pruned=3),
    )
    assert torch.equal(torch.get_rng_state(), before)
