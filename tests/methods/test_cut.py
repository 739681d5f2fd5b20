"""LoRA of twice the ranks that is cut once: by importance, or by singular values."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import gated as slow
from reference.truncated import singular_values, truncated
from session import BUILDS, Drive, logits, prepared, products

from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.allocation.policy import Scores
from loralloc.allocation.singular import singular_form
from loralloc.methods.prune import Prune, keep_what_fits
from loralloc.methods.truncate import Truncate

KINDS = [Prune, Truncate]


def made(kind, shape="llama", **options):
    return prepared(kind(rank=3, **options), BUILDS[shape]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BUILDS)
def test_it_begins_with_twice_its_budget_and_ends_with_it_to_one_rank(kind, shape):
    method = made(kind, shape)
    budget = method.count(BUILDS[shape](), 3)
    dearest = max(map(rank_cost, lora_layers(method.model).values()))
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=5)
    assert method.num_stored() == 2 * budget
    with pytest.raises(RuntimeError, match="is cut to its budget after step 6, and the run ended"):
        method.finish()
    drive.train(until=6)
    assert budget - dearest < method.num_stored() <= budget
    drive.train()
    method.finish()
    assert method.first_eligible_step() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_the_end_it_trains_no_more(kind):
    method = made(kind, cut_by=1.0)
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=9)
    assert not method.is_cut
    drive.train()
    assert method.is_cut


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimiser_follows(kind):
    method = made(kind)
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=7)
    for a, b in weights_ab(lora_layers(method.model)).values():
        for weight in (a, b):
            assert drive.optimizer.state[weight]["exp_avg"].shape == weight.shape
            # The optimiser has not seen the directions of a truncated adapter before.
            assert drive.optimizer.state[weight]["step"] == (7 if kind is Prune else 1)


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_cut_outside_the_run_is_refused(share):
    with pytest.raises(ValueError, match=f"`cut_by` is {share}; it is a share of the run"):
        Prune(cut_by=share)


# Pruned.


@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=4), min_size=1, max_size=4),
    st.integers(0, 30),
)
def test_the_lowest_go_until_the_others_fit(values, budget):
    costs = {f"m{i}": i + 1 for i in range(len(values))}
    scores = {f"m{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(values)}
    plan = keep_what_fits(Scores(terms={"one": scores}), costs, budget)
    flat = [float(v) for x in values for v in x]
    each = [costs[f"m{i}"] for i, x in enumerate(values) for _ in x]
    expected = slow.keep_highest(flat, each, budget)
    found = [i in plan.kept[name] for name, x in scores.items() for i in range(len(x))]
    assert found == expected
    assert not any(plan.added.values())


def test_what_is_pruned_has_the_lowest_importance_of_the_score():
    from loralloc.allocation.importance import gradient

    method = made(Prune)
    drive = Drive(method, num_steps=10).begin()
    drive.train(until=5)
    seen = {}
    own = gradient.score

    def score(*args, **kwargs):
        seen["scores"] = own(*args, **kwargs)
        return seen["scores"]

    gradient.score = score
    try:
        drive.train(until=6)
    finally:
        gradient.score = own
    importance = torch.cat(list(seen["scores"].importance.values()))
    left = sum(ranks(lora_layers(method.model)).values())
    before = {name: len(x) for name, x in seen["scores"].importance.items()}
    after = ranks(lora_layers(method.model))
    cut = importance.sort(descending=True).values[left - 1]
    assert {name: int((x >= cut).sum()) for name, x in seen["scores"].importance.items()} == {
        name: after.get(name, 0) for name in before
    }


def test_a_score_that_is_gathered_is_refused():
    with pytest.raises(ValueError, match="`score` is 'sensitivity', which is gathered while"):
        Prune(score="sensitivity")


# Truncated.


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 100))
def test_the_singular_form_is_the_product_the_largest_first(rank, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(outputs, rank, generator=generator)
    a = torch.randn(rank, inputs, generator=generator)
    new_b, new_a, values = singular_form(b, a)
    assert new_b.shape == b.shape and new_a.shape == a.shape
    product = (b @ a).double().numpy()
    np.testing.assert_allclose((new_b @ new_a).numpy(), product, atol=1e-4)
    most = min(rank, inputs, outputs)
    np.testing.assert_allclose(values[:most], singular_values(product)[:most], atol=1e-4)
    assert not values[most:].any()
    for kept in range(1, rank + 1):
        best = truncated(product, min(kept, most))
        np.testing.assert_allclose((new_b[:, :kept] @ new_a[:kept]).numpy(), best, atol=1e-4)


def test_module_by_module_each_keeps_its_best_approximation():
    method = made(Truncate)
    Drive(method, num_steps=10).begin().train(until=5)
    before = products(method)
    method.cut(method.session.optimizer)
    for name, product in products(method).items():
        np.testing.assert_allclose(product, truncated(before[name], 3), atol=1e-5)
    assert set(ranks(lora_layers(method.model)).values()) == {3}


def test_over_all_modules_the_largest_singular_values_stay():
    method = made(Truncate, over="all")
    costs = {name: rank_cost(layer) for name, layer in lora_layers(method.model).items()}
    Drive(method, num_steps=10).begin().train(until=5)
    before = products(method)
    method.cut(method.session.optimizer)
    pool = [(v, name) for name, x in before.items() for v in singular_values(x)[:6]]
    pool.sort()
    while sum(costs[name] for _, name in pool) > method.budget:
        pool.pop(0)
    expected = {name: sum(name == other for _, other in pool) for name in before}
    found = ranks(lora_layers(method.model))
    assert {name: found.get(name, 0) for name in before} == expected
    assert len(set(expected.values())) > 1


def test_what_is_cut_off_is_all_that_changes():
    method = made(Truncate)
    Drive(method, num_steps=10).begin().train(until=5)
    batch = tiny.batch_for(BUILDS["llama"](), seed=9)
    method.rank = 6  # nothing is to go
    before = logits(method, batch)
    method.cut(method.session.optimizer)
    torch.testing.assert_close(logits(method, batch), before, atol=1e-4, rtol=1e-4)


def test_another_word_for_what_is_cut_over_is_refused():
    with pytest.raises(ValueError, match="`over` is 'both'; use 'module' or 'all'"):
        Truncate(over="both")
