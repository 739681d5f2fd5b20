"""Young ranks scored by what they could still do."""

import math

import pytest
import tiny
import torch
from reference.new_ranks import with_potential

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.choices import measured_by
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import gradient, potential, screened
from loralloc.allocation.layers import lora_layers, weight_b, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Scores, plan

builds = pytest.mark.parametrize("build", [tiny.llama, tiny.bert_classifier])


def trained(build, num_steps=15):
    """A model, and the batch that it has learned: its ranks have made something of that."""
    model = tiny.adapted(build())
    batch = tiny.batch_for(model, seed=3)
    tiny.train(model, batch, num_steps)
    return model, batch


def young_of(model):
    """Of every second module the last two ranks, whose columns are small."""
    names = list(lora_layers(model))
    young = {name: frozenset({2, 3}) if i % 2 else frozenset() for i, name in enumerate(names)}
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            weight_b(layer)[:, sorted(young[name])] *= 0.01
    return young


def norms_of_the_models_own_gradient(model, batch):
    """|dL/db_r| by autograd through the loss that the model itself reports, all at once."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {
        name: [math.sqrt(float((column**2).sum())) for column in weight_b(layer).grad.t()]
        for name, layer in lora_layers(model).items()
    }
    model.zero_grad()
    return found


@builds
def test_equals_the_formula_rank_by_rank(build):
    model, batch = trained(build)
    young = young_of(model)
    columns = weights_b(lora_layers(model))
    objective = Objective(model, tiny.micro_batches(batch, 4))
    limits = Limits(num_pruned=3, young=young)
    plain = gradient.score(objective, columns, limits)
    scores = potential.score(objective, columns, limits, measure=gradient.score)

    norms = norms_of_the_models_own_gradient(model, batch)
    listed = {name: values.tolist() for name, values in plain.importance.items()}
    expected = with_potential(listed, norms, young)

    for name, values in scores.importance.items():
        torch.testing.assert_close(values, torch.tensor(expected[name]), rtol=1e-3, atol=1e-6)
        assert (scores.terms["potential"][name] > 0).nonzero().flatten().tolist() == sorted(
            young[name]
        )
    assert scores.terms["only"] is plain.terms["only"] or all(
        torch.equal(scores.terms["only"][n], plain.terms["only"][n]) for n in listed
    )


def test_where_none_is_young_it_costs_and_changes_nothing(monkeypatch):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    monkeypatch.setattr(potential, "gradient_norms", None)
    objective, columns = Objective(model, [tiny.batch_for(model)]), weights_b(lora_layers(model))
    scores = potential.score(objective, columns, Limits(num_pruned=1), measure=gradient.score)
    plain = gradient.score(objective, columns, Limits(num_pruned=1))
    assert all(torch.equal(scores.importance[n], x) for n, x in plain.importance.items())
    assert not any(x.any() for x in scores.terms["potential"].values())


def test_where_old_ranks_have_made_nothing_a_young_one_promises_nothing():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    objective, columns = Objective(model, [tiny.batch_for(model)]), weights_b(lora_layers(model))

    def harmful(objective, weights_b, limits):
        return Scores(terms={"only": {name: -torch.ones(4) for name in weights_b}})

    limits = Limits(num_pruned=1, young=young_of(model))
    scores = potential.score(objective, columns, limits, measure=harmful)
    assert not any(x.any() for x in scores.terms["potential"].values())


def test_the_model_is_as_it_was():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()).train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective, columns = Objective(model, [tiny.batch_for(model)]), weights_b(lora_layers(model))
    limits = Limits(num_pruned=1, young={next(iter(columns)): frozenset({0})})
    potential.score(objective, columns, limits, measure=gradient.score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        p.grad is None and p.requires_grad == ("lora" in n) for n, p in model.named_parameters()
    )
    assert model.training


def short_run(score, newborns, num_rounds=5):
    model = tiny.adapted(tiny.llama())
    config = AllocationConfig(score=score, newborns=newborns, ranks_per_round=7)
    optimizer, batch = tiny.optimizer_for(model, lr=3e-3), tiny.batch_for(model)
    allocator = Allocator(model, config, tiny.micro_batches(batch, 3))
    tiny.train(model, batch, 20, optimizer)
    for number in range(num_rounds):
        allocator.step(optimizer, step=20 + number)
        tiny.train(model, batch, 1, optimizer)
    return allocator.record


def mean_churn(record):
    return sum(entry.churn for entry in record.rounds[1:]) / (len(record.rounds) - 1)


@pytest.mark.parametrize("score", ["gradient", "shapley"])
def test_a_loop_that_takes_back_what_it_gave_does_so_less(score):
    record = short_run(score, "potential")
    assert mean_churn(record) < mean_churn(short_run(score, "compete"))
    assert all(len(entry.terms["potential"]) for entry in record.rounds)
    total = sum(record.initial_ranks.values())
    assert all(sum(entry.ranks_after.values()) + entry.lost == total for entry in record.rounds)


def test_screening_settles_the_cut_that_the_potential_makes():
    model, batch = trained(tiny.llama)
    objective = Objective(model, [batch])
    limits, columns = Limits(num_pruned=9, young=young_of(model)), weights_b(lora_layers(model))
    config = AllocationConfig(score="screened", newborns="potential")
    scores = measured_by(config, plan)(objective, columns, limits)
    assert (
        scores.settled
        and scores.verified
        and any(x.any() for x in scores.terms["potential"].values())
    )
    without = screened.score(objective, columns, limits)
    assert plan(scores, limits).pruned != plan(without, limits).pruned


@pytest.mark.parametrize("score", ["sensitivity", "architecture"])
def test_a_score_that_reads_no_batch_has_no_potential(score):
    model = tiny.adapted(tiny.llama())
    config = AllocationConfig(score=score, newborns="potential")
    with pytest.raises(ValueError, match=f"`score` is '{score}', which is gathered.*reads none"):
        Allocator(model, config)
