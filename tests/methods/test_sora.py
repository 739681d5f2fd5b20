"""SoRA's proximal step, its gates' own optimiser, and when its budget is reached."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import gated as slow
from session import BUILDS, Drive, prepared

from loralloc.allocation.layers import lora_layers, rank_cost
from loralloc.methods.sora import Sora, soft_threshold


def made(**options) -> Sora:
    return prepared(Sora(**{"rank": 3, **options}), BUILDS["llama"]())


def test_the_proximal_step_by_hand():
    gates = torch.tensor([0.5, -0.2, 0.05, -0.1, 0.0])
    found = soft_threshold(gates, 0.1)
    torch.testing.assert_close(found, torch.tensor([0.4, -0.1, 0.0, 0.0, 0.0]))


@given(st.lists(st.floats(-4, 4, width=32), min_size=1), st.floats(0, 2, width=32))
def test_the_proximal_step(gates, xi):
    found = soft_threshold(torch.tensor(gates), xi)
    expected = [slow.soft_threshold(gate, xi) for gate in gates]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_a_step_of_the_gates_by_hand():
    method = made(xi=0.05)
    drive = Drive(method, lr=0.01).begin()
    drive.train(until=1)  # B is not zero any more
    before = method.gates.detach().clone()
    method._optimizer.state.clear()
    observed = []
    update = method.update_gates
    method.update_gates = lambda: (observed.append(method.gates.grad.clone()), update())
    drive.train(until=2)
    gradient = observed[0]
    adam = before - 0.01 * gradient / (gradient.abs() + 1e-8)  # AdamW's first step
    torch.testing.assert_close(method.gates.detach(), soft_threshold(adam, 0.05))


def test_the_gates_are_standard_normal_at_the_start():
    gates = made(rank=40).gates
    assert len(gates) == 80 * 14
    assert abs(gates.mean()) < 0.1
    assert abs(gates.std() - 1) < 0.1


def test_the_penalty_is_the_mean_of_the_gates():
    method = made(eta=0.5)
    expected = 0.5 * method.gates.abs().sum() / 84
    assert method.extra_loss().item() == pytest.approx(expected.item())


def test_the_gates_follow_the_runs_learning_rate():
    method = made(xi=0.0, eta=0.0)
    drive = Drive(method).begin()
    drive.train(until=2)
    before = method.gates.detach().clone()
    for group in drive.optimizer.param_groups:
        group["lr"] = 0.0
    drive.train(until=3)
    assert torch.equal(method.gates, before)


def test_a_gate_at_zero_may_come_back():
    method = made(xi=0.0)
    drive = Drive(method).begin()
    drive.train(until=2)
    method.gates.data[:10] = 0
    drive.train(until=3)
    assert (method.gates[:10] != 0).all()


def test_the_default_xi_makes_half_of_the_gates_zero_in_time():
    method = made(rank=20)
    drive = Drive(method, num_steps=100, lr=0.0).begin()
    drive.train(until=100)
    assert 45 <= method.budget_step <= 60
    assert 0.35 < method.sparsity < 0.6


def test_the_budget_may_be_reached_before_its_last_step():
    method = made(xi=0.1)
    drive = Drive(method).begin()
    drive.train()
    method.finish()
    assert 2 < method.budget_step < method.prune_step
    assert method.first_eligible_step() == method.budget_step
    dearest = max(rank_cost(layer) for layer in lora_layers(method.model).values())
    assert method.budget - dearest < method.num_stored() <= method.budget
    assert 0 < method.sparsity < 0.6


def test_without_a_proximal_step_the_smallest_gates_go_at_the_last_step():
    method = made(xi=0.0)
    Drive(method).begin().train()
    assert method.budget_step == method.prune_step == 24
    assert method.sparsity == 0
