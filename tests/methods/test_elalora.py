"""ElaLoRA: which triplets are exchanged, and what new ones begin with."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import competitors as slow
from reference.adalora import Triplet
from session import BUILDS, Drive, logits, prepared

from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.allocation.policy import Limits
from loralloc.methods.elalora import ElaLora, aside, exchange


def made(shape="llama", **options):
    return prepared(ElaLora(rank=3, **options), BUILDS[shape]())


modules = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4)),
    min_size=1,
    max_size=6,
)


@given(modules, st.integers(1, 3), st.integers(1, 6), st.integers(0, 5))
def test_the_exchange_is_the_papers(given, k, b, spare):
    scores, costs = [values for values, _ in given], [cost for _, cost in given]
    named = {f"m{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(scores)}
    limits = Limits(num_pruned=b, cost={f"m{i}": c for i, c in enumerate(costs)}, spare=spare)
    plan = exchange(named, limits, most=k)
    pruned, added, left = slow.exchange(scores, costs, k=k, b=b, spare=spare)
    assert [list(plan.pruned.get(name, ())) for name in named] == pruned
    assert list(plan.added.values()) == added
    assert plan.spare == left
    plan.check({name: len(x) for name, x in named.items()}, name="exchange")
    assert all(map(plan.rank_after, named))  # no module is emptied


def test_scores_are_adaloras_of_the_triplets_element_by_element():
    method = made(warmup_share=0.9, final_share=0.01, interval=0.01)
    name = "model.layers.1.self_attn.k_proj"
    drive = Drive(method, num_steps=100).begin()
    triplets, seen = None, []
    own = method.sensitivity.observe

    def observe():
        layer = lora_layers(method.model)[name]
        (a, b), e = weights_ab({name: layer})[name], method.factors[name]
        seen.append([t.detach().clone() for t in (a, a.grad, b, b.grad, e, e.grad)])
        own()

    method.sensitivity.observe = observe
    drive.train(until=5)
    triplets = [Triplet(seen[0][0].shape[1], seen[0][2].shape[0]) for _ in range(3)]
    for a, a_grad, b, b_grad, e, e_grad in seen:
        for i, triplet in enumerate(triplets):
            triplet.value.update(float(e[i]), float(e_grad[i]))
            for j, element in enumerate(triplet.right):
                element.update(float(a[i, j]), float(a_grad[i, j]))
            for j, element in enumerate(triplet.left):
                element.update(float(b[j, i]), float(b_grad[j, i]))
    found = method.sensitivity.score().importance[name]
    expected = torch.tensor([triplet.score for triplet in triplets])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
    assert float(expected.min()) > 0


@pytest.mark.parametrize("shape", BUILDS)
def test_rounds_move_ranks_at_one_budget_of_parameters(shape):
    method = made(shape, moved=6)
    budget = method.num_trained()
    dearest = max(map(rank_cost, lora_layers(method.model).values()))
    drive = Drive(method, num_steps=40).begin()
    assert list(method.rounds) == list(range(7, 22))
    drive.train(until=6)
    assert set(ranks(lora_layers(method.model)).values()) == {3}
    drive.train(until=22)
    after = ranks(lora_layers(method.model))
    assert set(after.values()) != {3}
    assert budget - dearest < method.num_trained() <= budget
    assert method.num_trained() + method.spare == budget
    drive.train()
    assert ranks(lora_layers(method.model)) == after
    assert method.first_eligible_step() == 21


@pytest.mark.parametrize("step", [7, 14, 19, 21])
def test_fewer_and_fewer_are_moved(step):
    method = made()
    drive = Drive(method, num_steps=40).begin()
    expected = slow.num_moved(step, b=4, first=method.first, last=method.last)
    drive.train(until=step - 1)
    moved = []
    own = method.move
    method.move = lambda plan, **more: (moved.append(plan), own(plan, **more))
    drive.train(until=step)
    assert sum(sum(map(len, plan.pruned.values())) for plan in moved) == expected


def test_new_triplets_do_not_change_the_function_and_are_away_from_the_others():
    method = made(moved=8)
    drive = Drive(method, num_steps=40).begin()
    drive.train(until=6)
    batch = tiny.batch_for(BUILDS["llama"](), seed=9)
    plans = []
    own = method.move

    def move(plan, **more):
        plans.append(plan)
        own(plan, **more)

    method.move = move
    drive.train(until=7)
    (plan,) = plans
    grown = [name for name, count in plan.added.items() if count]
    assert grown
    before = logits(method, batch)
    for name in grown:
        (a, b), count = weights_ab(lora_layers(method.model))[name], plan.added[name]
        assert method.factors[name][-count:].tolist() == pytest.approx([1e-13] * count)
        for rows in (a, b.T):
            torch.testing.assert_close(rows[-1].norm(), torch.tensor(1.0))
        with torch.no_grad():
            a[-count:] = 0
    torch.testing.assert_close(logits(method, batch), before, atol=1e-5, rtol=1e-5)


def test_a_new_direction_is_what_orthonormal_rows_leave_of_a_random_one():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    rows = torch.cat([basis[:3], torch.zeros(2, 8)])
    aside(rows, 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(rows[:3], basis[:3])
    v = torch.randn(8, generator=torch.Generator().manual_seed(1))
    left = v - sum((v @ row) * row for row in basis[:3])
    torch.testing.assert_close(rows[3], left / left.norm())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": 0}, "`candidates` is 0; it must be at least 1"),
        ({"interval": 1.0}, "`interval` is 1.0; it is a share of the run"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ElaLora(**options)


def test_a_run_without_a_round_is_refused():
    drive = Drive(made(), num_steps=3)
    with pytest.raises(ValueError, match="Of the run's 3 steps elalora has its rounds between"):
        drive.begin()
