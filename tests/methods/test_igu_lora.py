"""IGU-LoRA: the path that it trains on, its score, and its budget."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import competitors as slow
from session import BUILDS, Drive, logits, prepared

from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab
from loralloc.methods.igu_lora import NODES, IguLora, PathSensitivity, off_diagonal


def made(shape="llama", **options):
    return prepared(IguLora(rank=3, **options), BUILDS[shape]())


@given(st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_penalty_is_of_products_of_different_rows(rows):
    found = float(off_diagonal(torch.tensor(rows, dtype=torch.float64)))
    assert found == pytest.approx(slow.off_diagonal(rows), abs=1e-9)


TRACKER = PathSensitivity(tiny.adapted(tiny.llama(), r=1), {})


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=5))
def test_an_elements_score_is_its_mean_over_its_deviation(steps):
    element = slow.Certain()
    for value, gradient in steps:
        element.update(value, gradient)
    mean, deviation = (torch.tensor([x]) for x in (element.sensitivity, element.uncertainty))
    assert float(TRACKER.element_score(mean, deviation)) == pytest.approx(element.score, rel=1e-4)


def test_a_triplets_score_is_that_of_its_factor_and_the_means_of_its_vectors():
    method = made()
    name = "model.layers.0.mlp.down_proj"
    drive = Drive(method, num_steps=1000).begin()
    elements: dict = {}
    own = method.sensitivity.observe

    def observe():
        layer = lora_layers(method.model)[name]
        (a, b), e = weights_ab({name: layer})[name], method.factors[name]
        for part, weight in (("a", a), ("b", b), ("e", e)):
            values, gradients = weight.detach().flatten(), weight.grad.flatten()
            of_part = elements.setdefault(part, [slow.Certain() for _ in values])
            for element, value, gradient in zip(of_part, values, gradients, strict=True):
                element.update(float(value), float(gradient))
        own()

    method.sensitivity.observe = observe
    drive.train(until=4)
    score = {part: torch.tensor([x.score for x in of]) for part, of in elements.items()}
    a, b = weights_ab(lora_layers(method.model))[name]
    expected = score["e"] + score["a"].view_as(a).mean(dim=1) + score["b"].view_as(b).mean(dim=0)
    found = method.sensitivity.score().importance[name]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_it_trains_at_a_point_of_the_path_that_the_step_draws():
    """With a A, a e and a B in the place of A, e and B the update is a^3 times itself."""
    method = made()
    drive = Drive(method, num_steps=1000).begin()
    points = []
    for _ in range(60):
        method.before_step()
        points.append(method.point)
        drive.session.steps_done += 1
    assert len(set(points)) > 10
    assert min(points) >= 1 / NODES and max(points) <= 1
    drive.session.steps_done = 0
    method.before_step()
    assert method.point == points[0]
    method.point = 0.5
    batch = tiny.batch_for(BUILDS["llama"](), seed=9)
    method.model.train()
    with torch.no_grad():
        training = method.model(**batch).logits
        for factor in method.factors.values():
            factor.mul_(0.5**3)
    evaluating = logits(method, batch)
    expected = training[batch["attention_mask"].bool()]
    torch.testing.assert_close(evaluating, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", BUILDS)
def test_it_prunes_along_the_budget_and_is_plain_lora_from_there(shape):
    method = made(shape, warmup_share=0.1, final_share=0.5)
    start = method.num_trained()
    costs = {name: rank_cost(layer) for name, layer in lora_layers(method.model).items()}
    dearest = max(costs.values())
    drive = Drive(method, num_steps=40).begin()
    assert (method.first, method.last) == (4, 20)
    for step in (4, 7, 12, 19):
        drive.train(until=step)
        left = sum(int(f.count_nonzero()) * costs[n] for n, f in method.factors.items())
        wanted = slow.igu_budget(step, start=start, end=start // 2, first=4, last=20)
        assert wanted - dearest < left <= wanted
    with pytest.raises(RuntimeError, match="igu-lora reaches its budget at step 20"):
        method.finish()
    drive.train(until=20)
    assert start // 2 - dearest < method.num_stored() <= start // 2
    assert not method.is_factored
    assert method.extra_loss() is None
    drive.train()
    method.finish()


def test_a_run_that_is_too_short_is_refused():
    drive = Drive(made(), num_steps=3)
    with pytest.raises(ValueError, match="Of the run's 3 steps igu-lora prunes between step 0"):
        drive.begin()
    with pytest.raises(ValueError, match=r"`interval` is 1.0; it is a share of the run"):
        IguLora(interval=1.0)
