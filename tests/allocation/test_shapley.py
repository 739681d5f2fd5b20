import pytest
import tiny
import torch
from reference import importance as reference

from loralloc.allocation.importance import shapley
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits

ANY = Limits(num_pruned=1)


def score(model, batches, **options):
    return shapley.score(Objective(model, batches), weights_b(lora_layers(model)), ANY, **options)


def trained(build):
    model = tiny.adapted(build(), r=3)
    batch = tiny.batch_for(model)
    tiny.train(model, batch, 20, tiny.optimizer_for(model, lr=3e-3))
    return model.eval(), batch


@pytest.mark.parametrize("build", tiny.MODELS)
def test_the_shares_sum_to_the_whole_improvement(build):
    model, batch = trained(build)
    scores = score(model, tiny.micro_batches(batch, 4))
    improvement = scores.s_full - scores.s_base
    total = sum(float(share.sum()) for share in scores.terms["share"].values())
    assert improvement > 0.01
    assert total == pytest.approx(improvement, rel=0.01)


def test_equals_the_integral_along_the_gates_taken_slowly():
    model, batch = trained(tiny.llama)
    num_points = 200
    expected: dict[str, torch.Tensor] = {}
    for point in range(num_points):
        at_point = reference.gate_derivatives(model, batch, (point + 0.5) / num_points)
        for name, slope in at_point.items():
            expected[name] = expected.get(name, 0) + slope / num_points
    share = score(model, [batch]).terms["share"]
    assert list(share) == list(expected)
    for name in expected:
        torch.testing.assert_close(share[name], expected[name], rtol=1e-2, atol=1e-6)


def test_one_node_is_the_derivative_half_way(monkeypatch):
    model, batch = trained(tiny.gpt2)
    monkeypatch.setattr(shapley, "MOST_DOUBLINGS", 0)
    share = score(model, [batch], num_nodes=1).terms["share"]
    for name, slope in reference.gate_derivatives(model, batch, 0.5).items():
        torch.testing.assert_close(share[name], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("doublings", [0, 3])
def test_nodes_are_doubled_until_the_shares_sum_to_the_whole(doublings, monkeypatch):
    model, batch = trained(tiny.llama)
    monkeypatch.setattr(shapley, "MOST_DOUBLINGS", doublings)
    scores = score(model, [batch], num_nodes=1)
    total = sum(float(share.double().sum()) for share in scores.terms["share"].values())
    gap = abs(total / (scores.s_full - scores.s_base) - 1)
    assert gap <= shapley.TOLERANCE if doublings else gap > shapley.TOLERANCE
