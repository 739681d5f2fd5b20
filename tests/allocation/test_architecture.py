"""ALoRA-DNAS: gates learned on one half of the data, weights on the other."""

import copy
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reference.variants import Alternation
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.gates import gate_ranks
from loralloc.allocation.importance.architecture import Gates
from loralloc.allocation.layers import lora_layers, ranks, weight_a, weight_b

NAME = "model.layers.1.mlp.up_proj"


def allocator_of(model, **options):
    usual = dict(score="architecture", seed=0, gate_lr=0.1)
    return Allocator(model, AllocationConfig(**{**usual, **options}))


def searched(model, num_steps=3, *, optimizer=None, **options):
    """A tiny search: each step a batch of either half."""
    allocator, optimizer = allocator_of(model, **options), optimizer or tiny.optimizer_for(model)
    search(model, allocator, optimizer, num_steps)
    return allocator, optimizer


def search(model, allocator, optimizer, num_steps=1, seed=0):
    for number in range(seed, seed + num_steps):
        allocator.learn([tiny.batch_for(model, seed=100 + number)])
        model(**tiny.batch_for(model, seed=number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gates_of(allocator):
    logits = allocator.state()["logits"]
    now = ranks(lora_layers(allocator.model))
    return dict(zip(now, (2 * torch.sigmoid(logits)).split(list(now.values())), strict=True))


@torch.no_grad()
def logits_of(model):
    return model(**tiny.batch_for(model, seed=9)).logits


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# The alternation.


class Line(nn.Module):
    """y = W x with W = 0 and the squared error, so that all can be written down."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, labels):
        y = self.linear(x)[:, 0]
        return ModelOutput(loss=(y - labels).square().mean(), logits=y)


def test_two_steps_by_hand():
    model = get_peft_model(Line(), LoraConfig(r=1, lora_alpha=1, target_modules=["linear"]))
    (layer,) = lora_layers(model).values()
    with torch.no_grad():
        weight_a(layer).fill_(1.0), weight_b(layer).fill_(0.5)
    gates = Gates(model, lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.SGD([weight_a(layer), weight_b(layer)], lr=0.1)
    one = torch.ones(1, 1)

    def step():
        gates.learn([{"x": one, "labels": torch.tensor([1.0])}])  # half 2: y should be 1
        model(x=one, labels=torch.tensor([2.0])).loss.backward()  # half 1: y should be 2
        optimizer.step()
        optimizer.zero_grad()
        return weight_a(layer).item(), weight_b(layer).item(), gates.state()["logits"].item()

    # Step 1. a' = 0, g = 1, y = 0.5: dL/dg = 2 (0.5 - 1) 0.5 = -0.5, dg/da' = 0.5, so dL/da' =
    # -0.25, and Adam's first step is lr against its sign.
    logit, g = 0.1, 2 / (1 + math.exp(-0.1))
    y = 0.5 * g
    a, b = 1 - 0.1 * 2 * (y - 2) * g * 0.5, 0.5 - 0.1 * 2 * (y - 2) * g * 1
    assert step() == pytest.approx((a, b, logit), rel=2e-5)
    assert (a, b) == pytest.approx((1.154871, 0.809742), abs=1e-6)

    # Step 2. Adam with b1 = 0.5, b2 = 0.999; the decay adds 0.01 a' to the gradient.
    gradient = 2 * (b * g * a - 1) * b * a * g * (1 - g / 2) + 0.01 * logit
    mean = 0.5 * (0.5 * -0.25) + 0.5 * gradient
    square = 0.999 * (0.001 * 0.0625) + 0.001 * gradient**2
    logit -= 0.1 * (mean / (1 - 0.5**2)) / (math.sqrt(square / (1 - 0.999**2)) + 1e-8)
    g = 2 / (1 + math.exp(-logit))
    y = b * g * a
    a, b = a - 0.1 * 2 * (y - 2) * g * b, b - 0.1 * 2 * (y - 2) * g * a
    assert step() == pytest.approx((a, b, logit), rel=2e-5)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert_classifier])
@pytest.mark.parametrize("weight_decay", [0, 0.5])
def test_it_is_first_order_darts(build, weight_decay):
    model, literal = (tiny.with_trained_b(tiny.adapted(build(), r=2)) for _ in range(2))
    alternation = Alternation(
        literal, tiny.optimizer_for(literal), lr=0.1, weight_decay=weight_decay
    )
    allocator, _ = searched(model, 4, gate_weight_decay=weight_decay)
    for seed in range(4):
        half_1, half_2 = (tiny.batch_for(literal, seed=of + seed) for of in (0, 100))
        alternation.step(half_1, half_2)
    expected = {name: gate.detach() for name, gate in alternation.gates().items()}
    torch.testing.assert_close(gates_of(allocator), expected, rtol=1e-3, atol=1e-3)
    assert max(float((gate - 1).abs().max()) for gate in expected.values()) > 0.02
    weights = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, literal)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


def test_while_gates_learn_the_weights_stay_and_get_no_gradient():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama())).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    allocator_of(model).learn([tiny.batch_for(model)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_while_the_weights_learn_the_gates_stay():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    allocator, optimizer = searched(model)
    before = allocator.state()
    model(**tiny.batch_for(model)).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in allocator.state().items())


def test_a_step_on_several_batches_is_one_on_all_their_targets():
    gates = []
    for size in (6, 4):
        model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
        allocator = allocator_of(model)
        allocator.learn(tiny.micro_batches(tiny.batch_for(model), size))
        allocator.learn(tiny.micro_batches(tiny.batch_for(model, seed=1), size))
        gates.append(gates_of(allocator))
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "fused", "bfloat16"])
def test_the_model_computes_with_the_gates(kind):
    from loralloc.kernels.lora import fuse

    model = tiny.with_trained_b(tiny.adapted(tiny.llama()), scale=0.5)
    if kind == "fused":
        fuse(model)
    if kind == "bfloat16":
        model.get_base_model().to(torch.bfloat16)
    plain = logits_of(model)
    allocator = allocator_of(model)
    for _ in range(3):
        allocator.learn([tiny.batch_for(model)])
    gated = logits_of(model)
    assert float((gated - plain).norm() / gated.norm()) > 0.1
    allocator.finish()
    assert num_hooks(model) == 0
    error = float((logits_of(model) - gated).norm() / gated.norm())
    assert error < (0.02 if kind == "bfloat16" else 1e-5)


def test_under_gradient_checkpointing():
    gates = []
    for wrap in (lambda model: model, tiny.checkpointing):
        model = wrap(tiny.with_trained_b(tiny.adapted(tiny.llama()))).train()
        allocator, _ = searched(model)
        gates.append(gates_of(allocator))
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-3, atol=1e-3)


# In rounds.


@pytest.mark.parametrize("build", tiny.MODELS)
def test_the_total_of_ranks_stays_and_the_record_says_what_was_measured(build):
    model = tiny.adapted(build())
    allocator, optimizer = allocator_of(model, num_rounds=3), tiny.optimizer_for(model)
    for number in range(3):
        search(model, allocator, optimizer, 3, seed=3 * number)
        allocator.step(optimizer, step=number)
    record = allocator.record
    total = sum(record.initial_ranks.values())
    assert [sum(entry.ranks_after.values()) for entry in record.rounds] == [total] * 3
    for entry in record.rounds:
        assert (entry.score, entry.s_full, entry.s_base) == ("architecture", None, None)
        assert list(entry.terms) == ["gate"]
    assert not allocator.is_gathering and num_hooks(model) == 0


def test_the_lowest_gates_go_and_the_others_go_into_b():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = searched(model)
    gates, before = gates_of(allocator), copy.deepcopy(model)
    columns = {name: weight_b(layer).clone() for name, layer in lora_layers(model).items()}
    entry = allocator.step(optimizer)
    flat = torch.cat(list(gates.values()))
    gone = torch.cat([gates[name][indices] for name, indices in entry.pruned.items()])
    assert sorted(gone.tolist()) == flat.sort().values[:7].tolist()
    for name, indices in entry.pruned.items():
        gates[name][indices] = 0.0
    for module in before.modules():
        module._forward_hooks.clear()
    gate_ranks(before, gates.__getitem__)
    torch.testing.assert_close(logits_of(model), logits_of(before), rtol=1e-4, atol=1e-5)
    layer = lora_layers(model)[NAME]
    kept = [i for i in range(4) if i not in entry.pruned.get(NAME, [])]
    torch.testing.assert_close(
        weight_b(layer)[:, : len(kept)], columns[NAME][:, kept] * gates[NAME][kept]
    )


def test_every_gate_begins_anew_and_adams_moments_stay_with_their_ranks():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = searched(model)
    before = allocator.state()
    entry = allocator.step(optimizer)
    after, start, now = allocator.state(), 0, 0
    assert not after["logits"].any()
    for name, rank in entry.ranks_before.items():
        kept = [start + i for i in range(rank) if i not in entry.pruned.get(name, [])]
        added = entry.added.get(name, 0)
        for key in ("mean", "square", "count"):
            part = after[key][now : now + len(kept) + added]
            assert torch.equal(part[: len(kept)], before[key][kept])
            assert not part[len(kept) :].any()
        start, now = start + rank, now + len(kept) + added
    assert now == len(after["logits"])


def test_a_new_gate_moves_as_far_in_its_first_step_as_the_first_ones_did():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = searched(model, 20, gate_weight_decay=0)
    entry = allocator.step(optimizer)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)  # B of new ranks is not zero any more
    allocator.learn([tiny.batch_for(model)])
    after, end = allocator.state(), 0
    for name, rank in entry.ranks_after.items():
        end += rank
        new = after["logits"][end - entry.added.get(name, 0) : end]
        assert new.abs().tolist() == pytest.approx([0.1] * len(new), rel=1e-2)
    assert entry.added


@pytest.mark.parametrize(
    ("kind", "options", "powers"),
    [
        (torch.optim.AdamW, dict(amsgrad=True), dict(exp_avg=1, exp_avg_sq=2, max_exp_avg_sq=2)),
        (torch.optim.SGD, dict(momentum=0.9), dict(momentum_buffer=1)),
    ],
)
def test_the_optimisers_moments_follow_b(kind, options, powers):
    model = tiny.adapted(tiny.llama())
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    allocator, _ = searched(model, optimizer=optimizer)
    gates = gates_of(allocator)
    states = {name: optimizer.state[weight_b(layer)] for name, layer in lora_layers(model).items()}
    before = {n: {key: state[key].clone() for key in powers} for n, state in states.items()}
    entry = allocator.step(optimizer)
    for name, layer in lora_layers(model).items():
        kept = [i for i in range(4) if i not in entry.pruned.get(name, [])]
        state = optimizer.state[weight_b(layer)]
        for key, power in powers.items():
            torch.testing.assert_close(
                state[key][:, : len(kept)],
                before[name][key][:, kept] / gates[name][kept] ** power,
            )
            assert not state[key][:, len(kept) :].any()


def test_a_module_that_leaves_takes_its_gates_along():
    model = tiny.adapted(tiny.llama(), r=1)
    allocator, optimizer = searched(model)
    entry = allocator.step(optimizer)
    assert 0 in entry.ranks_after.values()
    search(model, allocator, optimizer)
    allocator.step(optimizer, step=1)
    assert ranks(lora_layers(model)) == {n: r for n, r in allocator.record.ranks.items() if r}


# Going on.


def test_with_its_state_another_allocator_goes_on_the_same():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    allocator, _ = searched(model)
    other_model = copy.deepcopy(model)
    for module in other_model.modules():
        module._forward_hooks.clear()
    other = allocator_of(other_model)
    other.load_state(allocator.state())
    assert torch.equal(logits_of(other_model), logits_of(model))
    for one, of in ((allocator, model), (other, other_model)):
        one.learn([tiny.batch_for(of)])
    assert all(torch.equal(value, other.state()[key]) for key, value in allocator.state().items())


def test_the_state_of_other_ranks_is_refused():
    allocator, _ = searched(tiny.adapted(tiny.llama(), r=2))
    with pytest.raises(ValueError, match="are not those of 56 ranks; restore the adapter"):
        allocator_of(tiny.adapted(tiny.llama(), r=4)).load_state(allocator.state())


# What cannot be.


def test_until_its_gates_learn_the_model_is_not_touched():
    model = tiny.adapted(tiny.llama())
    allocator_of(model)
    assert num_hooks(model) == 0


def test_a_round_without_anything_learned_is_refused():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(RuntimeError, match="call `learn` before every step of the weights"):
        allocator_of(model).step(tiny.optimizer_for(model))


def test_a_loss_that_is_not_finite_refuses_the_round_and_leaves_the_model():
    model = tiny.adapted(tiny.llama())
    allocator, optimizer = searched(model)
    with torch.no_grad():
        weight_b(lora_layers(model)[NAME])[0, 0] = float("nan")
    allocator.learn([tiny.batch_for(model)])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ScoringError, match="left as it was: importance is not finite in model"):
        allocator.step(optimizer)
    assert all(
        torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0))
        for name, p in model.named_parameters()
    )
