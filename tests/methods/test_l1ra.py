"""L1RA: the penalty's step, and who loses and who receives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import competitors as slow
from session import BUILDS, Drive, logits, prepared

from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.allocation.policy import Limits
from loralloc.methods.l1ra import L1Ra, reassign


def made(shape="llama", **options):
    return prepared(L1Ra(rank=4, **options), BUILDS[shape]())


modules = st.lists(
    st.tuples(st.lists(st.integers(-1, 3), min_size=1, max_size=4), st.integers(1, 4)),
    min_size=1,
    max_size=6,
)


@given(modules, st.integers(0, 6))
def test_ranks_are_reassigned_as_the_paper_has_it(given, spare):
    gates, costs = [values for values, _ in given], [cost for _, cost in given]
    named = {f"m{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(gates)}
    cost = {f"m{i}": c for i, c in enumerate(costs)}
    plan = reassign(named, Limits(num_pruned=0, cost=cost, spare=spare))
    pruned, added, left = slow.reassign(gates, costs, spare)
    assert [list(plan.pruned.get(name, ())) for name in named] == pruned
    assert list(plan.added.values()) == added
    assert plan.spare == left
    plan.check({name: len(x) for name, x in named.items()}, name="reassign")


def test_after_adams_step_the_penalty_is_taken_off():
    plain, method = made(penalty=0.0, interval=0.9), made(penalty=2.0, interval=0.9)
    for one in (plain, method):
        Drive(one, num_steps=100).begin().train(until=1)
    for name, factor in method.factors.items():
        expected = [max(c - 0.02 * 2.0, 0.0) for c in plain.factors[name].tolist()]
        assert factor.tolist() == pytest.approx(expected)
        assert factor.max() < 1


def test_gates_stay_between_0_and_1_and_a_short_run_moves_ranks():
    method = made()
    drive = Drive(method, num_steps=40).begin()
    drive.train(until=31)
    gates = torch.cat([factor.detach() for factor in method.factors.values()])
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert method.off * 40 == pytest.approx(0.53)
    for factor in list(method.factors.values())[:2]:
        factor.data[0] = -1.0  # 0 after the next step, which is that of a round
    drive.train()
    method.finish()
    assert method.findings()["ranks_moved"] >= 2


def test_the_factors_have_a_learning_rate_of_their_own():
    method = made(gate_lr=0.3, penalty=0.0)
    drive = Drive(method, num_steps=100, lr=1e-4).begin()
    for factor in method.factors.values():
        factor.data.fill_(0.5)  # at 1 what would grow is held
    drive.train(until=2)  # B is zero in the first
    moved = torch.cat([(factor.detach() - 0.5).abs() for factor in method.factors.values()])
    assert float(moved.max()) == pytest.approx(0.3, rel=0.5)


@pytest.mark.parametrize("shape", BUILDS)
def test_what_is_emptied_goes_to_others_at_one_budget(shape):
    method = made(shape, penalty=2.0, interval=0.25)
    budget = method.num_trained()
    dearest = max(map(rank_cost, lora_layers(method.model).values()))
    drive = Drive(method, num_steps=40).begin()
    drive.train(until=9)
    chosen = list(method.factors)[:3]
    for name in chosen:
        method.factors[name].data[1:3] = -1.0
    drive.train(until=10)
    after = ranks(lora_layers(method.model))
    assert [after[name] for name in chosen] == [2] * 3
    assert max(after.values()) > 4
    assert budget - dearest < method.num_trained() <= budget
    assert method.num_trained() + method.spare == budget
    drive.train()
    method.finish()
    assert not method.is_factored


def test_new_ranks_begin_as_the_first_ones_did_and_change_nothing():
    method = made(interval=0.25)
    drive = Drive(method, num_steps=40).begin()
    for name, (a, b) in weights_ab(lora_layers(method.model)).items():
        assert float(a.detach().std()) == pytest.approx(1 / 4, rel=0.3), name
        assert not b.any()
    drive.train(until=9)
    first = next(iter(method.factors))
    method.factors[first].data[0] = 0.0
    drive.session.optimizer = drive.optimizer
    batch = drive.batch
    before = logits(method, batch)
    method.allocate(10)
    torch.testing.assert_close(logits(method, batch), before, atol=1e-5, rtol=1e-5)
    grown = {n: r for n, r in ranks(lora_layers(method.model)).items() if r > 4}
    assert grown
    for name in grown:
        assert method.factors[name][-1] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty": -1.0}, "`penalty` is -1.0; it must be a number from 0"),
        ({"interval": 0.0}, "`interval` is 0.0; it is a share of the run, between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        L1Ra(**options)
