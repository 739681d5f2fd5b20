"""IncreLoRA: what a module's score is, who receives, and that reserves learn but do not count."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import competitors as slow
from session import BUILDS, Drive, prepared

from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.methods.increlora import IncreLora, sensitivity

matrices = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


def made(shape="llama", **options):
    return prepared(IncreLora(rank=4, **options), BUILDS[shape]())


@given(matrices)
def test_sensitivity_of_a_module_is_the_papers(pairs):
    update, gradient = ([[p[i] for p in row] for row in pairs] for i in (0, 1))
    found = sensitivity(torch.tensor(update), torch.tensor(gradient))
    assert found == pytest.approx(slow.module_sensitivity(update, gradient), rel=1e-4, abs=1e-6)


def test_scores_are_of_the_update_and_the_gradient_by_it():
    """The gradient by D is that of a weight in its place."""
    method = made(grown_by=0.9)
    name = "model.layers.0.mlp.up_proj"
    drive = Drive(method, num_steps=100).begin()
    seen = []
    own = method.observe
    method.observe = lambda number: (seen.append(method._sums[name]), own(number))
    expected = []
    for step in range(1, 5):
        expected.append(_by_hand(method, drive.batch, name))
        drive.train(until=step)
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert seen[-1] > 0
    score = method._mean[name] * method._deviation[name]
    assert score == pytest.approx(slow.smoothed(expected), rel=1e-3)


def _by_hand(method, batch, name) -> float:
    update = _update(method, name, lora_layers(method.model)[name])
    base = tiny.llama()
    for other, module in lora_layers(method.model).items():
        base.get_submodule(other).weight.data += _update(method, other, module)
    base(**batch).loss.backward()
    gradient = base.get_submodule(name).weight.grad
    return slow.module_sensitivity(update.tolist(), gradient.tolist())


def _update(method, name, layer) -> torch.Tensor:
    """alpha / r_m B diag(e) A, where alpha is s times the rank of the budget."""
    (a, b), e = weights_ab({name: layer})[name], method.factors[name]
    return (2.0 * 4 / method.active[name] * b @ torch.diag(e) @ a).detach()


@pytest.mark.parametrize("shape", BUILDS)
def test_it_grows_from_one_triplet_to_the_budget_in_parameters(shape):
    method = made(shape)
    budget = method.count(BUILDS[shape](), 4)
    dearest = max(map(rank_cost, lora_layers(method.model).values()))
    assert set(method.active.values()) == {1}
    assert set(ranks(lora_layers(method.model)).values()) == {1 + 2}  # with those in reserve
    drive = Drive(method, num_steps=40).begin()
    drive.train(until=17)
    now = sum(method.active[n] * rank_cost(x) for n, x in lora_layers(method.model).items())
    assert now < budget
    assert len(set(method.active.values())) > 1
    with pytest.raises(RuntimeError, match="increlora reaches its budget at step 18, and the run"):
        method.finish()
    drive.train(until=18)
    assert ranks(lora_layers(method.model)) == method.active
    assert budget - dearest < method.num_stored() <= budget
    drive.train()
    method.finish()
    assert not any(layer._forward_hooks for layer in lora_layers(method.model).values())


def test_a_round_gives_to_the_modules_of_the_highest_scores():
    method = made(top=3, step_size=2)
    drive = Drive(method, num_steps=40).begin()
    drive.train(until=method.every - 1)
    before = dict(method.active)
    scores = {}
    own = method.allocate

    def allocate(number):
        scores.update({n: method._mean[n] * method._deviation[n] for n in method._mean})
        own(number)

    method.allocate = allocate
    drive.train(until=method.every)
    best = sorted(scores, key=lambda name: -scores[name])[:3]
    gained = {name: method.active[name] - before[name] for name in before}
    assert {name for name, count in gained.items() if count} == set(best)
    assert {gained[name] for name in best} == {2}


def test_those_in_reserve_learn_but_their_factors_stay():
    method = made(grown_by=0.9)
    drive = Drive(method, num_steps=100).begin()
    name = next(iter(method.factors))
    a, _ = weights_ab(lora_layers(method.model))[name]
    before = a.detach().clone()
    drive.train(until=1)
    assert method.factors[name][1:].tolist() == pytest.approx([1e-5] * 2)
    assert method.factors[name][0] != 0
    assert (a[1:] != before[1:]).any()
    # And once they are given they train.
    method.active[name] = 3
    drive.train(until=2)
    assert (method.factors[name][1:] - 1e-5).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top": 0}, "`top` is 0; it must be at least 1"),
        ({"grown_by": 1.0}, "`grown_by` is 1.0; it is a share of the run, between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        IncreLora(**options)
