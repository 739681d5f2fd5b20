"""GoRA: gradients of frozen weights, ranks from them, and the step that the adapter begins with."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import competitors as slow
from session import BUILDS, Drive, prepared

from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.kernels.lora import fuse
from loralloc.methods.gora import Gora, allocated, compressed, importance
from loralloc.methods.weight_gradients import WeightGradients


def made(shape="llama", **options):
    return prepared(Gora(rank=4, **options), BUILDS[shape]())


@pytest.mark.parametrize("is_fused", [False, True], ids=["PEFT's", "fused"])
@pytest.mark.parametrize("shape", BUILDS)
def test_gradients_of_frozen_weights_are_those_of_weights_that_train(shape, is_fused):
    model = tiny.with_trained_b(tiny.adapted(BUILDS[shape]())).train()
    if is_fused:
        fuse(model)
    batch = tiny.batch_for(model)
    seen = {}
    layers = lora_layers(model)
    with WeightGradients(layers, lambda name, gradient: seen.update({name: gradient})):
        model(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)
    model.zero_grad()
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    # PEFT's own path: the fused one gives frozen weights no gradient.
    model = model if not is_fused else _unfused(model, shape)
    model(**batch).loss.backward()
    for name, layer in lora_layers(model).items():
        expected = layer.get_base_layer().weight.grad
        expected = expected.T if layer.fan_in_fan_out else expected
        torch.testing.assert_close(seen[name], expected, atol=1e-6, rtol=1e-4)
    assert not any(layer._forward_hooks for layer in layers.values())


def _unfused(model, shape):
    plain = tiny.with_trained_b(tiny.adapted(BUILDS[shape]())).train()
    for layer in lora_layers(plain).values():
        layer.get_base_layer().weight.requires_grad_(True)
    return plain


def test_importance_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(3, 5, generator=generator) for _ in range(2))
    expected = slow.gora_importance(weight.tolist(), gradient.tolist())
    assert importance(weight, gradient) == pytest.approx(expected, rel=1e-5)


layers = st.lists(st.tuples(st.floats(1e-3, 10), st.integers(2, 200)), min_size=1, max_size=8)


@given(layers, st.integers(1, 8))
def test_ranks_are_shares_of_a_total_as_large_as_the_budget_allows(given, rank):
    values, costs = [value for value, _ in given], [cost for _, cost in given]
    least, most = max(1, rank // 2), 4 * rank
    found = allocated(
        {f"m{i}": v for i, v in enumerate(values)},
        {f"m{i}": c for i, c in enumerate(costs)},
        rank=rank,
        least=least,
        most=most,
    )
    budget = rank * sum(costs)
    size = sum(r * c for r, c in zip(found.values(), costs, strict=True))
    assert size <= budget
    assert all(least <= r <= most for r in found.values())
    # No other total gives larger ranks that fit.
    for total in np.geomspace(1e-2, 1e7, 500):
        ranks = slow.gora_ranks(values, costs, total=total, least=least, most=most)
        other = sum(r * c for r, c in zip(ranks, costs, strict=True))
        assert other <= size or other > budget


@given(st.integers(1, 4), st.integers(4, 7), st.integers(1, 5), st.integers(0, 99))
def test_b_is_the_papers(rank, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    g = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    if np.linalg.cond(a.numpy()) > 100:
        return
    expected = slow.gora_b(g.numpy(), a.numpy(), step_size=0.3, scale=2.0)
    np.testing.assert_allclose(-0.3 / 2.0 * compressed(g, a), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", BUILDS)
def test_it_begins_a_step_down_the_gradient_with_ranks_at_the_budget(shape):
    method = made(shape)
    budget = method.num_trained()
    dearest = max(map(rank_cost, lora_layers(method.model).values()))
    with torch.no_grad():
        other = tiny.batch_for(BUILDS[shape](), num_examples=8, seed=6)
        before = float(method.model(**other).loss)
    drive = Drive(method).begin()
    after = ranks(lora_layers(method.model))
    assert len(set(after.values())) > 1
    assert min(after.values()) >= 2 and max(after.values()) <= 16
    assert 0.9 * budget - dearest < method.num_trained() <= budget
    with torch.no_grad():
        assert float(method.model(**other).loss) < before
    known = {id(p) for group in drive.optimizer.param_groups for p in group["params"]}
    for a, b in weights_ab(lora_layers(method.model)).values():
        assert {id(a), id(b)} <= known
        assert a.grad is None and b.grad is None


def test_the_update_is_of_the_gradients_length():
    """s B A is g sqrt(in / r) of G's part in the span of A's rows, of length sqrt(r / in)."""
    method = made(step_size=0.05)
    seen = {}
    own = method._gradients

    def gradients(*args):
        found = own(*args)
        seen.update({name: gradient.clone() for name, gradient in found.items()})
        return found

    method._gradients = gradients
    Drive(method).begin()
    lengths = []
    for name, (a, b) in weights_ab(lora_layers(method.model)).items():
        update = 2.0 * (b @ a).detach()
        assert float((update * seen[name]).sum()) < 0
        lengths.append(float(update.norm() / seen[name].norm()))
    assert np.median(lengths) == pytest.approx(0.05, rel=0.35)


def test_b_has_its_own_learning_rate_also_once_ranks_are_found():
    method = made(ratio=4.0)
    drive = Drive(method, lr=0.01).begin()
    drive.train(until=1)
    optimizer = drive.optimizer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.04 if "lora_B" in name else 0.01)
    assert Gora().ratio == 16


def test_a_resumed_run_does_not_begin_again(tmp_path):
    method = made()
    Drive(method, num_steps=4).begin().train(until=2)
    method.save(tmp_path)
    again = made()
    drive = Drive(again, num_steps=4)
    again.load(tmp_path)
    drive.done = 2
    before = {n: p.detach().clone() for n, p in again.model.named_parameters()}
    drive.begin()
    assert all(torch.equal(p, before[n]) for n, p in again.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"least": 2.0}, "`least` is 2.0 and `most` 4.0; they are ranks over `rank`"),
        ({"step_size": 0.0}, "`step_size` is 0.0; it must be a number above 0"),
        ({"examples": 0}, "`examples` is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Gora(**options)
