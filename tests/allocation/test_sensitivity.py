"""ALoRA-Sensi: AdaLoRA's sensitivity over the training steps."""

import pytest
import tiny
import torch
from reference.variants import element_score, sensitivity, snapshot

from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance.sensitivity import Sensitivity
from loralloc.allocation.layers import lora_layers, ranks, weight_a, weight_b

NAME = "model.layers.1.mlp.up_proj"


def step_of(model, optimizer, seed=0):
    """An optimiser step, with its gradients left where they are."""
    optimizer.zero_grad()
    model(**tiny.batch_for(model, seed=seed)).loss.backward()
    optimizer.step()


def allocator_of(model, **options):
    return Allocator(model, AllocationConfig(score="sensitivity", seed=0, **options))


def trained(model, num_steps=3, **options):
    allocator, optimizer = allocator_of(model, **options), tiny.optimizer_for(model)
    for seed in range(num_steps):
        step_of(model, optimizer, seed)
        allocator.observe()
    optimizer.zero_grad()
    return allocator, optimizer


# The score.


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert_classifier])
def test_it_is_the_papers_element_by_element(build):
    model = tiny.adapted(build(), r=2)
    tracker, optimizer, steps = Sensitivity(model), tiny.optimizer_for(model), []
    for seed in range(4):
        step_of(model, optimizer, seed)
        tracker.observe()
        steps.append(snapshot(model))
    expected, found = sensitivity(steps), tracker.score()
    assert list(found.terms) == ["gate", "row", "column"]
    for term in expected:
        torch.testing.assert_close(found.terms[term], expected[term], rtol=1e-4, atol=1e-12)
    assert all(float(values.min()) > 0 for values in found.importance.values())


def test_by_hand():
    # I = 4, 0, 2: Ibar = 0.6, 0.51, 0.7335; Ubar = 0.15 (3.4, then 0.85 of it and so on).
    mean = deviation = 0.0
    for sensitivity_now, expected in ((4, 0.6 * 0.51), (0, 0.51 * 0.51), (2, 0.7335 * 0.623475)):
        mean = 0.85 * mean + 0.15 * sensitivity_now
        deviation = 0.85 * deviation + 0.15 * abs(sensitivity_now - mean)
        assert mean * deviation == pytest.approx(expected)
    assert element_score([4, 0, -2]) == pytest.approx(0.7335 * 0.623475)
    model = tiny.adapted(tiny.llama(), r=1)
    layer, tracker = lora_layers(model)[NAME], Sensitivity(model)
    a, b = weight_a(layer), weight_b(layer)
    with torch.no_grad():
        a.fill_(2.0), b.fill_(0.0)
        b[5] = -1.0
    for gradient_a, gradient_b in ((2, 0), (0, 3), (-1, -3)):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        a.grad[0, 7], b.grad[5, 0], b.grad[6, 0] = gradient_a, gradient_b, 100
        tracker.observe()
    terms = tracker.score().terms
    assert terms["row"][NAME].tolist() == pytest.approx([0.7335 * 0.623475 / 32], rel=1e-5)
    one = element_score([0, 3, 3])
    assert terms["column"][NAME].tolist() == pytest.approx([one / 48], rel=1e-5)
    assert terms["gate"][NAME].tolist() == pytest.approx([one], rel=1e-5)


def test_a_module_that_a_step_did_not_use_was_not_sensitive():
    model = tiny.adapted(tiny.llama(), r=2)
    tracker, optimizer = Sensitivity(model), tiny.optimizer_for(model)
    step_of(model, optimizer)
    layer = lora_layers(model)[NAME]
    weight_a(layer).grad = weight_b(layer).grad = None
    tracker.observe()
    importance = tracker.score().importance
    assert importance.pop(NAME).tolist() == [0.0, 0.0]
    assert all(bool(values.all()) for values in importance.values())


def test_the_model_is_as_it_was():
    model = tiny.adapted(tiny.llama(), r=2)
    step_of(model, tiny.optimizer_for(model))
    before = {name: (p.clone(), p.grad) for name, p in model.named_parameters()}
    gradients = {name: g.clone() for name, (_, g) in before.items() if g is not None}
    Sensitivity(model).observe()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])


# In rounds.


@pytest.mark.parametrize("build", tiny.MODELS)
def test_the_total_of_ranks_stays_and_the_record_says_what_was_measured(build):
    model = tiny.adapted(build())
    allocator, optimizer = allocator_of(model, num_rounds=3), tiny.optimizer_for(model)
    for number in range(3):
        for seed in range(3):
            step_of(model, optimizer, seed)
            allocator.observe()
        optimizer.zero_grad()
        allocator.step(optimizer, step=number)
    record = allocator.record
    total = sum(record.initial_ranks.values())
    assert [sum(entry.ranks_after.values()) for entry in record.rounds] == [total] * 3
    for entry in record.rounds:
        assert (entry.score, entry.s_full, entry.s_base) == ("sensitivity", None, None)
        assert set(entry.terms) == {"gate", "row", "column"}
    assert not allocator.is_gathering


def test_the_least_sensitive_ranks_go():
    allocator, optimizer = trained(tiny.adapted(tiny.llama()))
    entry = allocator.step(optimizer)
    importance = {
        (name, index): sum(entry.terms[term][name][index] for term in entry.terms)
        for name, rank in entry.ranks_before.items()
        for index in range(rank)
    }
    lowest = sorted(importance, key=importance.__getitem__)[:7]
    assert {(n, i) for n, indices in entry.pruned.items() for i in indices} == set(lowest)


def test_ranks_that_stay_keep_their_means_and_new_ones_begin_at_zero():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = trained(model)
    before = allocator.state()
    entry = allocator.step(optimizer)
    after = allocator.state()
    assert {key.rsplit(".", 2)[0] for key in after} == set(lora_layers(model))
    for name in lora_layers(model):
        kept = [i for i in range(4) if i not in entry.pruned.get(name, [])]
        for part, dim in (("gate", 0), ("row", 0), ("column", 1)):
            for kind in ("mean", "deviation"):
                was, now = before[f"{name}.{part}.{kind}"], after[f"{name}.{part}.{kind}"]
                carried, new = now.split([len(kept), entry.added.get(name, 0)], dim=dim)
                assert torch.equal(carried, was.index_select(dim, torch.tensor(kept)))
                assert not new.any()


def test_the_means_of_a_module_that_leaves_are_dropped():
    model = tiny.adapted(tiny.llama(), r=1)
    allocator, optimizer = trained(model)
    entry = allocator.step(optimizer)
    assert 0 in entry.ranks_after.values()
    step_of(model, optimizer)
    allocator.observe()
    allocator.step(optimizer, step=1)
    assert ranks(lora_layers(model)) == {n: r for n, r in allocator.record.ranks.items() if r}


# Going on.


def test_with_its_state_another_allocator_goes_on_the_same():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = trained(model)
    other = allocator_of(model)
    other.load_state({key: value.clone() for key, value in allocator.state().items()})
    step_of(model, optimizer)
    for one in (allocator, other):
        one.observe()
    found, expected = other.state(), allocator.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_state_of_other_ranks_is_refused():
    allocator, _ = trained(tiny.adapted(tiny.llama(), r=2))
    with pytest.raises(ValueError, match="is not that of a module with 4 ranks"):
        allocator_of(tiny.adapted(tiny.llama(), r=4)).load_state(allocator.state())


# What cannot be.


def test_a_round_without_any_step_observed_is_refused():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(RuntimeError, match="call `observe` after every"):
        allocator_of(model).step(tiny.optimizer_for(model))


def test_observing_without_gradients_is_refused():
    with pytest.raises(RuntimeError, match="before gradients are cleared"):
        allocator_of(tiny.adapted(tiny.llama())).observe()


def test_scoring_batches_are_refused():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match="scoring batches would have no effect"):
        Allocator(model, AllocationConfig(score="sensitivity"), [tiny.batch_for(model)])


def test_more_rounds_than_the_configuration_has_are_refused():
    allocator, optimizer = trained(tiny.adapted(tiny.llama()), num_rounds=1)
    allocator.step(optimizer)
    with pytest.raises(RuntimeError, match="The 1 rounds of the allocation are over"):
        allocator.step(optimizer)


def test_gradients_that_are_not_finite_refuse_the_round_and_leave_the_model():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = trained(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step_of(model, optimizer)
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
    weight_b(lora_layers(model)[NAME]).grad[0, 0] = float("nan")
    allocator.observe()
    with pytest.raises(ScoringError, match=f"left as it was: importance is not finite in {NAME}"):
        allocator.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
