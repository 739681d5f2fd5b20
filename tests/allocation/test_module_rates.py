"""A learning rate for every module, by its rank."""

import pytest
import tiny
import torch
from test_new_state import Adam8Bit
from trainers import Interrupted, KillAt, adapter, causal_trainer, options

from loralloc import attach
from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.module_rates import ModuleRates
from loralloc.allocation.resize import resize

GROWN, SHRUNK = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
TARGETS = {GROWN: 8, SHRUNK: 1}
POWER = 0.5
FACTORS = {GROWN: (4 / 8) ** POWER, SHRUNK: (4 / 1) ** POWER}

LINEAR = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adam_8_bits": Adam8Bit,
}


def unequal():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    resize(model, TARGETS, generator=torch.Generator().manual_seed(0))
    return model


def groups_by_module(model, make):
    """The same optimiser with a group for every rate, as its paper would have it."""
    groups = {}
    for name, pair in weights_ab(lora_layers(model)).items():
        groups.setdefault(FACTORS.get(name, 1.0), []).extend(pair)
    optimizer = make([{"params": params} for params in groups.values()])
    for group, factor in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] *= factor
    return optimizer


@pytest.mark.parametrize("make", list(LINEAR.values()), ids=list(LINEAR))
def test_equals_groups_with_learning_rates_of_their_own(make):
    model, reference = unequal(), unequal()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    initial = dict.fromkeys(lora_layers(model), 4)
    ModuleRates(model, initial, POWER, "default").follow(optimizer)
    exact = groups_by_module(reference, make)
    for seed in range(4):
        tiny.train(model, tiny.batch_for(model, seed=seed), 1, optimizer)
        tiny.train(reference, tiny.batch_for(reference, seed=seed), 1, exact)
    start = unequal()
    for name, weight in model.named_parameters():
        other, begun = reference.get_parameter(name), start.get_parameter(name)
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)
        if weight.requires_grad:
            assert not torch.equal(weight, begun)
    assert len(optimizer.param_groups) == 1


def test_it_differs_from_one_rate_for_all_and_power_0_is_one_rate():
    after = []
    for power in (0.0, POWER, None):
        model = unequal()
        optimizer = tiny.optimizer_for(model)
        if power is not None:
            rates = ModuleRates(model, dict.fromkeys(lora_layers(model), 4), power, "default")
            rates.follow(optimizer)
        tiny.train(model, tiny.batch_for(model), 2, optimizer)
        after.append(model.state_dict())
    zero, half, none = after
    assert all(torch.equal(zero[name], none[name]) for name in none)
    changed = [name for name in none if not torch.equal(half[name], none[name])]
    assert any(GROWN in name for name in changed)


def test_once_released_the_steps_are_the_optimisers_own():
    model, plain = unequal(), unequal()
    optimizer = tiny.optimizer_for(model)
    rates = ModuleRates(model, dict.fromkeys(lora_layers(model), 4), POWER, "default")
    rates.follow(optimizer)
    rates.follow(optimizer)  # twice is once
    rates.release()
    tiny.train(model, tiny.batch_for(model), 2, optimizer)
    tiny.train(plain, tiny.batch_for(plain), 2)
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_round_changes_the_rates_of_the_modules_that_it_changes():
    model = tiny.adapted(tiny.llama())
    optimizer, batch = tiny.optimizer_for(model), tiny.batch_for(model)
    config = AllocationConfig(rank_lr_power=1.0)
    allocator = Allocator(model, config, [batch])
    allocator.begin(optimizer)
    tiny.train(model, batch, 3, optimizer)
    entry = allocator.step(optimizer, step=3)
    before = {n: [w.detach().clone() for w in pair] for n, pair in weights(model)}
    tiny.train(model, batch, 1, optimizer)
    scaled = {n: [w.detach().clone() for w in pair] for n, pair in weights(model)}
    # The same step without the rates, from the same weights.
    twin = tiny.adapted(tiny.llama())
    other = tiny.optimizer_for(twin)
    again = Allocator(twin, AllocationConfig(), [batch])
    tiny.train(twin, batch, 3, other)
    again.step(other, step=3)
    tiny.train(twin, batch, 1, other)
    for name, pair in weights(twin):
        factor = 4 / entry.ranks_after[name]
        for at_one_rate, mine, begun in zip(pair, scaled[name], before[name], strict=True):
            expected = begun + factor * (at_one_rate.detach() - begun)
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def weights(model):
    return weights_ab(lora_layers(model)).items()


@pytest.mark.slow
def test_a_resumed_run_has_the_rates_of_the_unbroken_one(tmp_path):
    changes = dict(save_strategy="steps", save_steps=4)
    config = options(rank_lr_power=0.7, new_state="survivors", newborns="protected")
    whole = causal_trainer(tmp_path / "whole")
    attach(whole, config)
    whole.train()
    cut = causal_trainer(tmp_path / "cut", callbacks=[KillAt(8)], **changes)
    attach(cut, config)
    with pytest.raises(Interrupted):
        cut.train()
    again = causal_trainer(tmp_path / "cut", **changes)
    method = attach(again, config)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    expected, found = adapter(whole.model), adapter(again.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = causal_trainer(tmp_path / "plain")
    attach(plain, options(new_state="survivors", newborns="protected"))
    plain.train()
    assert any(not torch.equal(x, expected[n]) for n, x in adapter(plain.model).items())
    # The optimiser is left as it was.
    assert not again.optimizer.optimizer._optimizer_step_pre_hooks
    assert len(method.record.rounds) == 3


def test_without_begin_a_round_is_refused():
    model = tiny.adapted(tiny.llama())
    allocator = Allocator(model, AllocationConfig(rank_lr_power=1), [tiny.batch_for(model)])
    with pytest.raises(RuntimeError, match=r"not followed; call `begin\(optimizer\)` before"):
        allocator.step(tiny.optimizer_for(model))


@pytest.mark.parametrize(
    ("make", "words"),
    [(torch.optim.Rprop, "Rprop takes steps that a learning rate only begins with")],
)
def test_an_optimiser_whose_steps_do_not_follow_a_rate_is_refused(make, words):
    model = tiny.adapted(tiny.llama())
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    allocator = Allocator(model, AllocationConfig(rank_lr_power=1), [tiny.batch_for(model)])
    with pytest.raises(TypeError, match=words):
        allocator.begin(optimizer)
    Allocator(model, AllocationConfig(), [tiny.batch_for(model)]).begin(optimizer)
