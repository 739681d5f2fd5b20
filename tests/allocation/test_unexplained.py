"""The largest directions of dL/dW that an adapter does not explain, and rows of A along them."""

import pytest
import tiny
import torch
from reference.unexplained import gradients, outside

from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import unexplained
from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from loralloc.allocation.new_rows import LENGTH, NewRows, rows_of
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize
from loralloc.kernels.lora import fuse, unfuse

NAME = "model.layers.0.mlp.down_proj"


def measured(model, batches, num=3, **options):
    layers = lora_layers(model)
    return unexplained.measure(
        Objective(model, batches),
        layers,
        dict.fromkeys(layers, num),
        generator=torch.Generator().manual_seed(0),
        **options,
    )


@pytest.mark.parametrize("build", tiny.MODELS)
def test_equals_the_singular_values_of_the_whole_gradient(build):
    model = tiny.with_trained_b(tiny.adapted(build(), r=3))
    batch = tiny.batch_for(model)
    found = measured(model, tiny.micro_batches(batch, 4))
    for name, gradient in gradients(model, batch).items():
        layer = lora_layers(model)[name]
        rows, scaling = weight_a(layer).detach(), layer.scaling["default"]
        part = outside(gradient, rows)
        exact = torch.linalg.svdvals(scaling * part)[:3]
        torch.testing.assert_close(found[name].values[:1], exact[:1], rtol=0.02, atol=1e-6)
        torch.testing.assert_close(found[name].values, exact, rtol=0.1, atol=1e-6)
        # The directions are those: they give what the values say, to the iteration's error.
        reached = (scaling * gradient @ found[name].rows.t()).norm(dim=0)
        torch.testing.assert_close(reached, exact, rtol=0.1, atol=1e-6)
        own = (scaling * gradient @ rows.t()).norm(dim=0)
        torch.testing.assert_close(found[name].own, own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_directions_are_orthogonal_to_each_other_and_to_the_rows_there(build):
    model = tiny.with_trained_b(tiny.adapted(build()))
    for name, of in measured(model, [tiny.batch_for(model)], num=5).items():
        rows = torch.nn.functional.normalize(weight_a(lora_layers(model)[name]).detach(), dim=1)
        assert (of.rows @ rows.t()).abs().max() < 1e-5
        torch.testing.assert_close(of.rows @ of.rows.t(), torch.eye(5), rtol=0, atol=1e-5)
        assert list(of.values) == sorted(of.values, reverse=True)


def test_the_fused_step_and_checkpointing_give_the_same():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    batch = [tiny.batch_for(model)]
    plain = measured(model, batch)
    fuse(model)
    fused = measured(model, batch)
    unfuse(model)
    again = measured(tiny.checkpointing(model).train(), batch)
    for name, of in plain.items():
        for other in (fused[name], again[name]):
            torch.testing.assert_close(other.values, of.values, rtol=1e-3, atol=1e-6)


def test_the_model_is_as_it_was():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()).train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    measured(model, [tiny.batch_for(model)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())
    assert model.training


def test_no_more_directions_are_found_than_there_are():
    # 6 rows of 32 elements are left over; and a module whose gradient is zero has no direction.
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=26, target_modules=["q_proj"]))
    first, second = measured(model, [tiny.batch_for(model)], num=10).values()
    assert first.rows.shape == (6, 32) and len(second.values) == 6
    with torch.no_grad():  # nothing of the first block reaches the loss
        model.get_base_model().model.layers[0].self_attn.o_proj.weight.zero_()
    first, second = measured(model, [tiny.batch_for(model)], num=10).values()
    assert first.rows.shape == (0, 32) and len(first.values) == 0 and len(second.values) == 6


def test_a_gradient_that_is_not_finite_refuses_the_round_and_changes_nothing(monkeypatch):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    config = AllocationConfig(new_rows="gradient")
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(
        unexplained.replicas, "averaged", lambda sums: {n: x / 0 for n, x in sums.items()}
    )
    with pytest.raises(ScoringError, match=r"Round 1 at step 3 .* the gradient of .* not finite"):
        allocator.step(None, step=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Rows of new ranks.


@pytest.mark.parametrize("policy", ["paper", "worth"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert_classifier])
def test_new_rows_read_what_was_not_read_and_leave_the_function_alone(build, policy):
    model = tiny.adapted(build())
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 5, optimizer)
    config = AllocationConfig(
        new_rows="gradient", new_state="survivors", policy=policy, min_rank=1, ranks_per_round=5
    )
    allocator = Allocator(model, config, [batch])
    for step in range(3):
        # Pruned ranks change the function; with their columns at zero only new ones could.
        rows = {name: weight_a(layer).detach() for name, layer in lora_layers(model).items()}
        entry = allocator.step(optimizer, step=5 + step)
        for name, count in entry.added.items():
            new = weight_a(lora_layers(model)[name]).detach()[-count:]
            torch.testing.assert_close(new.norm(dim=1), torch.full((count,), LENGTH))
            old = torch.nn.functional.normalize(rows[name], dim=1)
            assert (new @ old.t()).abs().max() < 1e-5
            assert not weight_b(lora_layers(model)[name])[:, -count:].any()
        tiny.train(model, batch, 1, optimizer)


def test_a_new_row_lowers_the_loss_faster_than_a_drawn_one():
    losses = {}
    for new_rows in ("kaiming", "gradient"):
        model = tiny.adapted(tiny.llama(), r=2)
        batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model, lr=3e-3)
        tiny.train(model, batch, 3, optimizer)
        config = AllocationConfig(new_rows=new_rows, ranks_per_round=14)
        allocator = Allocator(model, config, [batch])
        allocator.step(optimizer, step=3)
        tiny.train(model, batch, 3, optimizer)
        with torch.no_grad():
            losses[new_rows] = float(model(**batch).loss)
    assert losses["gradient"] < losses["kaiming"]


def test_where_fewer_rows_are_found_the_others_are_drawn():
    model = tiny.adapted(tiny.llama())
    generator = torch.Generator().manual_seed(1)
    given = NewRows(rows=torch.full((1, 48), 0.25), gradient=torch.ones(1))
    plan = Plan(kept={NAME: (0, 1, 2, 3)}, added={NAME: 3}, pruned={})
    resize(model, plan, generator=generator, new_rows={NAME: given})
    new = weight_a(lora_layers(model)[NAME]).detach()[4:]
    assert torch.equal(new[0], torch.full((48,), 0.25))
    assert new[1:].abs().max() <= 48**-0.5 and not torch.equal(new[1], new[2])


@pytest.mark.parametrize("shape", [(4, 48), (1, 32), (48,)])
def test_rows_that_do_not_fit_are_refused(shape):
    model = tiny.adapted(tiny.llama())
    plan = Plan(kept={NAME: (0, 1, 2, 3)}, added={NAME: 3}, pruned={})
    given = NewRows(rows=torch.zeros(shape), gradient=torch.ones(shape[0]))
    with pytest.raises(ValueError, match="gets 3 new ranks; give at most as many rows, of 48"):
        resize(model, plan, new_rows={NAME: given})


def test_the_state_of_a_new_column_is_in_proportion_to_the_gradient_that_its_row_sees():
    model = tiny.adapted(tiny.llama())
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 5, optimizer)
    layer = lora_layers(model)[NAME]
    found = measured(model, [batch])
    plan = Plan(kept={NAME: (1, 2)}, added={NAME: 2}, pruned={NAME: (0, 3)})
    rows = rows_of(plan, found)
    usual = ((found[NAME].own[1] ** 2 + found[NAME].own[2] ** 2) / 2) ** 0.5
    times = [float(LENGTH * found[NAME].values[i] / usual) for i in range(2)]
    before = optimizer.state[weight_b(layer)]["exp_avg_sq"][:, [1, 2]].mean(dim=1)
    before_a = optimizer.state[weight_a(layer)]["exp_avg_sq"][[1, 2]].mean(dim=0)
    resize(model, plan, optimizer=optimizer, new_state="survivors", new_rows=rows)
    after = optimizer.state[weight_b(layer)]["exp_avg_sq"]
    for i in range(2):
        torch.testing.assert_close(after[:, 2 + i], before * times[i] ** 2)
        torch.testing.assert_close(optimizer.state[weight_a(layer)]["exp_avg_sq"][2 + i], before_a)


@pytest.mark.parametrize(
    "options", [{"new_rows": "gradient"}, {"policy": "worth"}], ids=["rows", "worth"]
)
def test_a_score_that_reads_no_batch_leaves_nothing_to_measure_on(options):
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{option}` is '{value}', which is measured on the scor"):
        Allocator(tiny.adapted(tiny.llama()), AllocationConfig(score="sensitivity", **options))
