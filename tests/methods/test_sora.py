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
    method = made(xi=0.05, gate_lr=0.01)
    drive = Drive(method).begin()
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


@pytest.mark.parametrize(("num_steps", "expected"), [(1000, 0.01), (10_000, 0.001), (40, 0.1)])
def test_gates_can_move_as_far_in_a_run_of_any_length_unless_it_has_a_few_steps(
    num_steps, expected
):
    method = made()
    Drive(method, num_steps=num_steps).begin()
    (group,) = method._optimizer.param_groups
    assert group["lr"] == pytest.approx(expected)


def test_the_fitting_threshold_by_hand():
    method = made()
    Drive(method, num_steps=40).begin()  # the budget is due after step 24
    with torch.no_grad():
        method.costs.fill_(10)
        method.budget = 420
        method.gates.copy_(torch.arange(1, 85))
    method.num_steps_done = 4
    # Of 1 ... 84 the largest that has to go is 42, and there are 20 steps left.
    assert method._fitting_threshold() == pytest.approx(42 / 20)


def test_what_is_kept_is_not_the_draw():
    method = made(rank=8)
    Drive(method, num_steps=120, lr=1e-3).begin().train()
    found = method.findings()
    # At random it would be about a half.
    assert 0.3 < found["overlap_with_draw"] < 0.85


def test_gates_at_the_runs_own_learning_rate_would_keep_the_draw():
    method = made(rank=8, gate_lr=1e-3, xi=0.6745 / 72)
    Drive(method, num_steps=120, lr=1e-3).begin().train()
    assert method.findings()["overlap_with_draw"] > 0.95


def test_what_is_found_goes_into_the_runs_log():
    method, logged = made(), []
    drive = Drive(method)
    drive.session.log = logged.append
    drive.begin().train()
    (entry,) = logged
    assert entry == {f"sora_{name}": value for name, value in method.findings().items()}
    assert set(entry) == {"sora_sparsity", "sora_overlap_with_draw"}


def test_a_gate_at_zero_may_come_back():
    method = made(xi=0.0)
    drive = Drive(method).begin()
    drive.train(until=2)
    method.gates.data[:10] = 0
    drive.train(until=3)
    assert (method.gates[:10] != 0).all()


@pytest.mark.parametrize("options", [{}, {"gate_lr": 0.0}, {"gate_lr": 0.5}])
def test_by_itself_xi_makes_as_many_gates_zero_as_have_to_be_just_in_time(options):
    method = made(rank=8, **options)
    drive = Drive(method, num_steps=50).begin()
    drive.train(until=20)
    assert (method.gates == 0).float().mean() < 0.45
    drive.train()
    assert method.budget_step == 30
    assert method.found["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_the_budget_may_be_reached_before_its_last_step():
    method = made(xi=0.1, gate_lr=0.01)
    drive = Drive(method).begin()
    drive.train()
    method.finish()
    assert 2 < method.budget_step < method.prune_step
    assert method.first_eligible_step() == method.budget_step
    dearest = max(rank_cost(layer) for layer in lora_layers(method.model).values())
    assert method.budget - dearest < method.num_stored() <= method.budget
    assert 0 < method.found["sparsity"] < 0.6


def test_without_a_proximal_step_the_smallest_gates_go_at_the_last_step():
    method = made(xi=0.0)
    Drive(method).begin().train()
    assert method.budget_step == method.prune_step == 24
    assert method.found["sparsity"] == 0
