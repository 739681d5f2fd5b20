"""SaLoRA's hard-concrete gates, its Lagrangian, and what is drawn when."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import gated as slow
from session import BUILDS, Drive, logits, prepared

from loralloc.allocation.layers import lora_layers
from loralloc.methods.salora import SaLora, chance_open, hard_concrete


def made(**options) -> SaLora:
    return prepared(SaLora(**{"rank": 3, **options}), BUILDS["llama"]())


def test_the_gate_by_hand():
    log_a = torch.tensor([0.0, 2.94, -3.0, math.log(1 / 3)])
    # sigmoid gives 1/2, 0.95, 0.047 and 1/4; stretched 0.5, 1.04, -0.04 and 0.2.
    torch.testing.assert_close(hard_concrete(log_a), torch.tensor([0.5, 1.0, 0.0, 0.2]))
    noise = torch.full((4,), math.log(3))  # u = 3/4
    assert hard_concrete(log_a, noise)[0] == pytest.approx(0.8)  # sigmoid gives 3/4


@given(st.floats(-8, 8), st.floats(0.01, 0.99))
def test_the_gate(log_a, u):
    noise = torch.tensor(math.log(u) - math.log(1 - u))
    assert hard_concrete(torch.tensor(log_a), noise).item() == pytest.approx(
        slow.hard_concrete(log_a, u), abs=1e-5
    )
    assert hard_concrete(torch.tensor(log_a)).item() == pytest.approx(
        slow.hard_concrete(log_a, 0.5), abs=1e-5
    )


def test_the_chance_of_being_open_by_hand():
    # log(1/11) = -2.398: sigmoid(2.398) = 11/12, and with log a = -log 11 it is 1/2.
    found = chance_open(torch.tensor([0.0, -math.log(11), 2.94]))
    torch.testing.assert_close(found, torch.tensor([11 / 12, 0.5, 0.99521]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("log_a", [-4.0, -2.0, 0.0, 1.0])
def test_the_chance_of_being_open_by_drawing(log_a):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200_000, generator=generator).logit()
    drawn = hard_concrete(torch.full_like(noise, log_a), noise)
    share = (drawn > 0).float().mean().item()
    assert share == pytest.approx(chance_open(torch.tensor(log_a)).item(), abs=0.004)
    assert share == pytest.approx(slow.chance_open(log_a), abs=0.004)


def test_the_lagrangian():
    method = made(orthogonality=0.0)
    drive = Drive(method, num_steps=40).begin()
    with torch.no_grad():
        method.gates.normal_(-2.0, 2.0)
        for multiplier, value in zip(method.multipliers, (0.7, 1.3), strict=True):
            multiplier.fill_(value)
    for step, target in ((0, 1.0), (3, 0.875), (12, 0.5), (20, 0.5)):
        method.num_steps_done = step
        expected = slow.lagrangian(
            method.gates.tolist(), method.costs.tolist(), target=target, multipliers=(0.7, 1.3)
        )
        assert method.extra_loss().item() == pytest.approx(expected, rel=1e-4)
    assert drive.done == 0


def test_the_regulariser_by_hand():
    method = made(orthogonality=0.1, rank=1)
    Drive(method).begin()
    for layer in lora_layers(method.model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.zero_()
            a[0, 0] = a[1, 1] = 2.0  # A A^T = 4 I, which is 3 I from I
            b.zero_()
            b[0, 0] = 1.0  # B^T B = diag(1, 0)
    # ||3 I||_F + ||diag(0, -1)||_F for two ranks.
    assert method.extra_loss().item() == pytest.approx(0.1 * (3 * math.sqrt(2) + 1), rel=1e-5)


def test_the_multipliers_climb_while_too_much_is_left():
    method = made(warmup_share=0.0, gate_lr=0.01)
    drive = Drive(method).begin()
    drive.train(until=1)  # t is 1 before the first step, and C / C_0 is 0.995
    linear, quadratic = method.multipliers
    assert (linear.item(), quadratic.item()) == pytest.approx((-0.01, 1.0), rel=1e-2)
    drive.train(until=8)
    assert linear > 0.02 and quadratic > 2


@pytest.mark.parametrize("num_steps", [40, 100, pytest.param(300, marks=pytest.mark.slow)])
def test_the_density_reaches_its_target_however_short_the_run_is(num_steps):
    method = made()
    Drive(method, num_steps=num_steps).begin().train()
    found = method.findings()
    assert found["target_density"] == 0.5
    assert found["density"] == pytest.approx(0.5, abs=0.06)


def test_at_a_rate_that_does_not_fit_the_run_the_density_says_so():
    method = made(gate_lr=0.01)
    Drive(method, num_steps=100).begin().train()
    assert method.findings()["density"] > 0.95


def test_log_a_can_move_as_far_in_a_run_of_any_length():
    method = made()
    Drive(method, num_steps=3000).begin()  # pruned after 1,800 steps
    assert [group["lr"] for group in method._optimizer.param_groups] == [0.01, 0.01, 1.0]


def test_the_gates_close_where_the_multipliers_say_so():
    method = made(warmup_share=0.0)
    drive = Drive(method).begin()
    drive.train(until=2)
    before = method.gates.detach().clone()
    method.multipliers[0].data.fill_(1e6)
    drive.train(until=8)
    assert (method.gates < before).all()


def test_a_step_draws_one_gate_for_all_its_batches():
    method = made()
    tiny.with_trained_b(method.model)
    Drive(method).begin()
    with torch.no_grad():
        method.gates.zero_()
    batch = tiny.causal_batch()

    def loss() -> float:
        method.watch(batch)
        with torch.no_grad():
            return method.model(**batch).loss.item()

    method.model.train()
    first = loss()
    assert loss() == first
    in_evaluation = logits(method, batch)
    assert torch.equal(logits(method, batch), in_evaluation)
    assert loss() == first
    method.update_gates()
    assert loss() != first


def test_evaluation_draws_nothing():
    method = made()
    before = torch.get_rng_state()
    logits(method, tiny.causal_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_ranks_with_the_highest_log_a_are_kept():
    method = made()
    drive = Drive(method, num_steps=10).begin()
    with torch.no_grad():
        lowest, highest = torch.linspace(-5, -2, 42), torch.linspace(2, 5, 42)
        method.gates.copy_(torch.cat([lowest, highest]))  # the first block's are lowest
    with tiny.seeded(4):  # gates are drawn in every step
        drive.train(until=6)
    names = lora_layers(method.model)
    assert not any("layers.0.self_attn" in name for name in names)
    assert {r for name, layer in names.items() if "layers.1" in name for r in layer.r.values()} == {
        6
    }
    assert method.found["sparsity"] > 0.2
