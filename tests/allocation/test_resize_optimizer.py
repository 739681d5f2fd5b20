"""A rank that stays trains on as if the pruned had never been; a new one starts from nothing."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import Adafactor

from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from loralloc.allocation.optimizer_state import check_shapes
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize

NAME = "model.layers.0.mlp.down_proj"
KEPT, PRUNED, NUM_ADDED = (1, 2), (0, 3), 2
PLAN = Plan(kept={NAME: KEPT}, added={NAME: NUM_ADDED}, pruned={NAME: PRUNED})

OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
every_optimiser = pytest.mark.parametrize("make", list(OPTIMISERS.values()), ids=list(OPTIMISERS))


def gradients(num_steps, seed=0):
    """Of A (4, 48) and B (32, 4), as if of a loss in which ranks do not meet."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 48, generator=generator), torch.randn(32, 4, generator=generator))
        for _ in range(num_steps)
    ]


def step(optimizer, a, b, gradient_a, gradient_b):
    a.grad, b.grad = gradient_a.clone(), gradient_b.clone()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@every_optimiser
def test_a_surviving_rank_never_notices_the_pruned_ones(make):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    layer, kept = lora_layers(model)[NAME], list(KEPT)
    optimizer = make(trainable(model))
    # The reference: an optimiser over the surviving ranks alone, from the start.
    alone_a = torch.nn.Parameter(weight_a(layer).detach()[kept].clone())
    alone_b = torch.nn.Parameter(weight_b(layer).detach()[:, kept].clone())
    alone = make([alone_a, alone_b])

    for gradient_a, gradient_b in gradients(5):
        step(optimizer, weight_a(layer), weight_b(layer), gradient_a, gradient_b)
        step(alone, alone_a, alone_b, gradient_a[kept], gradient_b[:, kept])
    resize(model, PLAN, optimizer=optimizer)
    for gradient_a, gradient_b in gradients(3, seed=1):
        step(optimizer, weight_a(layer), weight_b(layer), gradient_a, gradient_b)
        step(alone, alone_a, alone_b, gradient_a[:2], gradient_b[:, :2])

    torch.testing.assert_close(weight_a(layer)[:2], alone_a, rtol=0, atol=1e-7)
    torch.testing.assert_close(weight_b(layer)[:, :2], alone_b, rtol=0, atol=1e-7)


@every_optimiser
def test_every_state_has_its_parameters_shape(make):
    model = tiny.adapted(tiny.llama())
    optimizer = make(trainable(model))
    tiny.train(model, tiny.batch_for(model), 2, optimizer)
    resize(model, 3, optimizer=optimizer)
    resize(model, PLAN_OF_3, optimizer=optimizer)
    assert set(optimizer.state) <= set(model.parameters())
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.shape == parameter.shape
                assert value.is_contiguous()
                assert value.dtype == parameter.dtype
    tiny.train(model, tiny.batch_for(model), 2, optimizer)


PLAN_OF_3 = Plan(kept={NAME: (0, 2)}, added={NAME: 1}, pruned={NAME: (1,)})


def test_a_new_rank_starts_with_zero_moments_and_the_parameters_step_count():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    layer = lora_layers(model)[NAME]
    tiny.train(model, tiny.batch_for(model), 3, optimizer)
    moments = optimizer.state[weight_a(layer)]["exp_avg"].clone()
    resize(model, PLAN, optimizer=optimizer)
    state_a, state_b = optimizer.state[weight_a(layer)], optimizer.state[weight_b(layer)]
    assert float(state_a["step"]) == float(state_b["step"]) == 3
    assert torch.equal(state_a["exp_avg"][:2], moments[list(KEPT)])
    for key in ("exp_avg", "exp_avg_sq"):
        assert not state_a[key][2:].any()
        assert not state_b[key][:, 2:].any()


@pytest.mark.parametrize(
    ("make", "key", "begin"),
    [(OPTIMISERS["adagrad"], "sum", 0.1), (OPTIMISERS["rprop"], "step_size", 0.01)],
    ids=["adagrad", "rprop"],
)
def test_state_that_does_not_begin_at_zero_begins_so_for_a_new_rank(make, key, begin):
    model = tiny.adapted(tiny.llama())
    optimizer, layer = make(trainable(model)), lora_layers(model)[NAME]
    tiny.train(model, tiny.batch_for(model), 2, optimizer)
    resize(model, PLAN, optimizer=optimizer)
    new_a = optimizer.state[weight_a(layer)][key][2:]
    new_b = optimizer.state[weight_b(layer)][key][:, 2:]
    assert torch.equal(new_a, torch.full_like(new_a, begin))
    assert torch.equal(new_b, torch.full_like(new_b, begin))


def test_before_the_first_step_there_is_no_state_to_carry():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    resize(model, PLAN, optimizer=optimizer)
    assert not optimizer.state
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    assert set(optimizer.state) == set(trainable(model))


def two_groups(model):
    """LoRA+: B learns faster than A."""
    by_part = {
        part: [p for name, p in model.named_parameters() if f"lora_{part}" in name] for part in "AB"
    }
    return torch.optim.AdamW(
        [{"params": by_part["A"], "lr": 1e-3}, {"params": by_part["B"], "lr": 1.6e-2}]
    )


def names_in_groups(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def test_new_parameters_take_the_old_ones_places_and_learning_rates():
    model = tiny.adapted(tiny.llama())
    optimizer = two_groups(model)
    before = names_in_groups(model, optimizer)
    resize(model, PLAN, optimizer=optimizer)
    assert names_in_groups(model, optimizer) == before
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1.6e-2]


def test_an_emptied_module_leaves_the_optimiser():
    model = tiny.adapted(tiny.llama())
    optimizer = two_groups(model)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    before = names_in_groups(model, optimizer)
    resize(model, {NAME: 0}, optimizer=optimizer)
    assert names_in_groups(model, optimizer) == [
        [name for name in names if NAME not in name] for names in before
    ]
    assert set(optimizer.state) == set(trainable(model))
    tiny.train(model, tiny.batch_for(model), 1, optimizer)


def test_names_of_parameters_stay_beside_them_where_a_module_is_emptied():
    model = tiny.adapted(tiny.llama())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named)
    resize(model, {NAME: 0}, optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in named if NAME not in n]
    assert names_in_groups(model, optimizer) == [optimizer.param_groups[0]["param_names"]]


def test_a_scheduler_goes_on_where_it_was():
    model = tiny.adapted(tiny.llama())
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 10)
    for _ in range(3):
        tiny.train(model, tiny.batch_for(model), 1, optimizer)
        scheduler.step()
    resize(model, PLAN, optimizer=optimizer)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.6e-3, 0.6 * 1.6e-2])
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()


def test_the_state_can_be_saved_and_loaded_into_the_same_shapes():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    resize(model, PLAN, optimizer=optimizer)
    again = tiny.optimizer_for(model)
    again.load_state_dict(optimizer.state_dict())
    check_shapes(again)
    for parameter in trainable(model):
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_the_optimiser_under_a_wrapper_is_found():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    resize(model, PLAN, optimizer=SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)))
    assert weight_a(lora_layers(model)[NAME]) in set(optimizer.param_groups[0]["params"])


def test_a_frozen_half_needs_no_place_in_the_optimiser():
    model = tiny.adapted(tiny.llama())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    resize(model, PLAN, optimizer=tiny.optimizer_for(model))
    layer = lora_layers(model)[NAME]
    assert not weight_a(layer).requires_grad
    assert weight_b(layer).requires_grad


# Refusals.


def test_state_that_cannot_follow_is_refused_before_anything_is_changed():
    model = tiny.adapted(tiny.llama())
    optimizer = Adafactor(trainable(model), lr=1e-3, relative_step=False)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    before = list(model.parameters())
    with pytest.raises(TypeError, match=r"Adafactor keeps `exp_avg_sq_row` of every parameter"):
        resize(model, PLAN, optimizer=optimizer)
    assert all(x is y for x, y in zip(model.parameters(), before, strict=True))


def test_a_stale_state_is_found():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    check_shapes(optimizer)
    parameter = trainable(model)[0]
    optimizer.state[parameter]["exp_avg"] = torch.zeros(5, 32)
    with pytest.raises(TypeError, match=r"AdamW keeps `exp_avg` of shape \(5, 32\)"):
        check_shapes(optimizer)


def test_a_parameter_that_the_optimiser_does_not_know_is_refused():
    model = tiny.adapted(tiny.llama())
    stranger = tiny.optimizer_for(tiny.adapted(tiny.llama()))
    with pytest.raises(ValueError, match=r"is not in the optimiser.*never train"):
        resize(model, PLAN, optimizer=stranger)


def test_a_refusal_changes_neither_model_nor_optimiser():
    model = tiny.adapted(tiny.llama())
    only_a = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_A" in n])
    before = list(model.parameters())
    with pytest.raises(ValueError, match="not in the optimiser"):
        resize(model, PLAN, optimizer=only_a)
    assert set(only_a.param_groups[0]["params"]) <= set(model.parameters())
    assert all(x is y for x, y in zip(model.parameters(), before, strict=True))
