"""LoRA linears that read the same input are one fused function."""

import copy

import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, fused_copy
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from loralloc.allocation.resize import resize
from loralloc.kernels.lora import fuse


def adapted(build=tiny.llama, **options):
    return tiny.with_trained_b(tiny.adapted(build(), **options))


@pytest.mark.parametrize(
    ("build", "of_a_block"),
    [
        (tiny.llama, [3, 1, 2, 1]),  # q, k and v; o; gate and up; down
        (tiny.bert_classifier, [3, 1, 1, 1]),
        (tiny.gpt2, [1, 1, 1, 1]),  # one c_attn for all three
    ],
)
def test_siblings_share_one_function(build, of_a_block, monkeypatch):
    model = adapted(build)
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == of_a_block * 2


def test_only_adapted_siblings_are_computed_together(monkeypatch):
    model = adapted(target_modules=["q_proj", "v_proj", "up_proj"])
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == [2, 1] * 2


@pytest.mark.parametrize("emptied", ["q_proj", "k_proj", "v_proj"])
def test_rounds_resize_and_empty_modules_of_a_group(emptied, monkeypatch):
    model = adapted()
    fused = fused_copy(model)
    block = "model.layers.0.self_attn."
    to = {f"{block}{emptied}": 0, f"{block}o_proj": 1, "model.layers.1.self_attn.k_proj": 9}
    for each in (model, fused):
        resize(each, to, generator=torch.Generator().manual_seed(0))
        tiny.with_trained_b(each)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == [2, 1, 2, 1, 3, 1, 2, 1]


def test_a_sibling_with_dropout_runs_the_forward_of_peft(monkeypatch):
    model = adapted().train()
    other = copy.deepcopy(model)
    for each in (model, other):
        each.base_model.model.model.layers[0].self_attn.k_proj.lora_dropout["default"] = nn.Dropout(
            0.5
        )
    fused = fused_copy(other)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == [2, 1, 2, 1, 3, 1, 2, 1]


def test_cross_attention_is_not_grouped(monkeypatch):
    model = adapted(tiny.t5, target_modules=["q", "k", "v"])
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    encoder, decoder = [3], [3, 1, 1, 1]
    assert calls == encoder * 2 + decoder * 2


class Attention(nn.Module):
    """Three LoRA linears of PEFT, called as they are told to be."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            base = nn.Linear(6, 5).requires_grad_(False)
            layer = Linear(base, "default", LoraConfig(r=2, lora_alpha=3), r=2, lora_alpha=3)
            nn.init.normal_(layer.lora_B["default"].weight)
            setattr(self, name, layer)


def attentions():
    with tiny.seeded(4):
        peft = Attention()
    return peft, fused_copy(peft)


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_siblings_with_different_inputs_stop_being_a_group(monkeypatch):
    peft, fused = attentions()
    x, memory = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    calls = Calls(monkeypatch)
    for _ in range(2):
        results = []
        for each in (peft, fused):
            each.zero_grad()
            x.grad = memory.grad = None
            outputs = each.q_proj(x), each.k_proj(memory), each.v_proj(memory)
            sum(output.square().sum() for output in outputs).backward()
            results.append((outputs, gradients(each), x.grad, memory.grad))
        torch.testing.assert_close(*results)
    assert calls == [3, 1, 1, 1, 1, 1]  # from the second pass on each is computed once


@pytest.mark.parametrize("order", [("k", "q", "v"), ("v", "k", "q"), ("q", "q", "k", "v", "v")])
def test_any_order_of_calls_gives_the_right_values(order):
    peft, fused = attentions()
    for seed in range(2):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        results = []
        for each in (peft, fused):
            each.zero_grad()
            outputs = [getattr(each, f"{name}_proj")(x) for name in order]
            sum(output.square().sum() for output in outputs).backward()
            results.append((outputs, gradients(each)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("used", ["q_proj", "k_proj", "v_proj"])
def test_outputs_that_nothing_uses_get_no_gradient(used):
    results = []
    for each in attentions():
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        outputs = {name: getattr(each, name)(x) for name in ("q_proj", "k_proj", "v_proj")}
        outputs[used].square().sum().backward()
        results.append((gradients(getattr(each, used)), x.grad))
    torch.testing.assert_close(*results)


def test_an_interrupted_pass_leaves_nothing_behind():
    peft, fused = attentions()
    fused.q_proj(torch.ones(2, 6, requires_grad=True))  # and nothing calls k and v
    x = torch.linspace(-1, 1, 18).view(3, 6)
    for each in (copy.deepcopy(fused), fused):
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.testing.assert_close(getattr(each, name)(x), getattr(peft, name)(x))
        assert each.q_proj.shared_input._input is None and not each.q_proj.shared_input._outputs


def test_outputs_of_a_group_may_be_changed_in_place():
    results = []
    for each in attentions():
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        each.q_proj(x).mul_(2).sum().backward()
        results.append((gradients(each.q_proj), x.grad))
    torch.testing.assert_close(*results)


def test_copies_have_groups_of_their_own(monkeypatch):
    _, fused = attentions()
    twin = copy.deepcopy(fused)
    calls = Calls(monkeypatch)
    x = torch.ones(2, 6)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(twin, name)(x)
    assert calls == [3]
    assert twin.q_proj.shared_input is twin.k_proj.shared_input
    assert twin.q_proj.shared_input is not fused.q_proj.shared_input


def test_fusing_again_changes_nothing(monkeypatch):
    model = adapted()
    fused = fused_copy(model)
    assert fuse(fused) == 0
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == [3, 1, 2, 1] * 2
