import pytest
import rounding
import tiny
import torch
from reference import importance as reference

from loralloc.allocation.importance import ablation, gradient
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits

ANY = Limits(num_pruned=1)


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("build", tiny.MODELS)
def test_equals_autograd_through_the_gates(build):
    model = tiny.with_trained_b(tiny.adapted(build(), r=3))
    batch = tiny.batch_for(model)
    at_full = reference.gate_derivatives(model, batch, 1.0)
    at_base = reference.gate_derivatives(model, batch, 0.0)
    for size in (1, 4, 6):
        objective = Objective(model, tiny.micro_batches(batch, size))
        scores = gradient.score(objective, weights_b(lora_layers(model)), ANY)
        assert list(scores.terms["without"]) == list(at_full)
        close = dict(rtol=1e-4, atol=rounding.of_losses(model, scores.s_full, scores.s_base))
        for name in at_full:
            torch.testing.assert_close(scores.terms["without"][name], at_full[name], **close)
            torch.testing.assert_close(scores.terms["only"][name], at_base[name], **close)


@pytest.mark.parametrize("build", tiny.MODELS)
def test_orders_ranks_as_ablation_does_after_a_little_training(build):
    model = tiny.adapted(build(), r=4)
    batch = tiny.batch_for(model, num_examples=8)
    tiny.train(model, batch, 20, tiny.optimizer_for(model, lr=1e-3))
    weights = weights_b(lora_layers(model))
    objective = Objective(model, [batch])
    first_order = gradient.score(objective, weights, ANY)
    exact = ablation.score(objective, weights, ANY)
    atol = rounding.of_losses(model, exact.s_full, exact.s_base)
    assert first_order.s_full == pytest.approx(exact.s_full, abs=atol)
    assert first_order.s_base == pytest.approx(exact.s_base, abs=atol)
    left = torch.cat(list(first_order.importance.values()))
    right = torch.cat(list(exact.importance.values()))
    assert spearman(left, right) >= 0.99
    assert float((left - right).norm() / right.norm()) < 0.1


def test_tends_to_ablation_as_the_adapter_gets_small():
    batch = tiny.causal_batch()
    errors = []
    for scale in (0.04, 0.02):
        model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2), scale=scale)
        weights = weights_b(lora_layers(model))
        objective = Objective(model, [batch])
        left = torch.cat(list(gradient.score(objective, weights, ANY).importance.values()))
        right = torch.cat(list(ablation.score(objective, weights, ANY).importance.values()))
        errors.append(float((left - right).norm()))
    # The error of first order is of second order: half the adapter, a quarter of the error.
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.25)


def test_a_new_rank_has_no_importance():
    model = tiny.adapted(tiny.gpt2())  # every B is zero
    objective = Objective(model, [tiny.batch_for(model)])
    scores = gradient.score(objective, weights_b(lora_layers(model)), ANY)
    assert all(not term.any() for term in scores.importance.values())
