"""What the fused LoRA step does not cover runs PEFT's own forward, and says nothing."""

import copy

import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, fused_copy
from peft import LoHaConfig, LoraConfig
from peft.tuners.loha import Linear as LoHaLinear
from peft.tuners.lora import Linear
from torch import nn
from torch._dynamo.testing import CompileCounter

from loralloc.allocation.layers import lora_layers
from loralloc.kernels.lora import fuse


def adapted(**options):
    return tiny.with_trained_b(tiny.adapted(tiny.llama(), **options))


def assert_runs_peft(model, fused, monkeypatch):
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused, tolerance=0)
    assert calls == []


@pytest.mark.parametrize("option", [dict(lora_dropout=0.5), dict(use_dora=True)], ids=str)
def test_options_of_peft(option, monkeypatch):
    model = adapted(**option).train()
    assert_runs_peft(model, fused_copy(model), monkeypatch)


def test_dropout_is_fused_where_it_does_nothing(monkeypatch):
    model = adapted(lora_dropout=0.5).eval()
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert calls == [3, 1, 2, 1] * 2


def test_copies_of_a_model_on_several_gpus(monkeypatch):
    """Those of `nn.DataParallel` hold their weights otherwise than as parameters."""
    model = adapted()
    fused = fused_copy(model)
    for layer in lora_layers(fused).values():
        layer._is_replica = True
    assert_runs_peft(model, fused, monkeypatch)


def test_a_bias_of_b(monkeypatch):
    model = tiny.gpt2()  # whose layers have biases, as PEFT asks
    model = tiny.with_trained_b(tiny.adapted(model, lora_bias=True))
    assert_runs_peft(model, fused_copy(model), monkeypatch)


def test_a_compiled_model_is_one_graph_of_pefts_own_forward(monkeypatch):
    model = adapted()
    part = "base_model.model.model.layers.0.mlp"
    fused, counter = fused_copy(model).get_submodule(part), CompileCounter()
    calls, x = Calls(monkeypatch), torch.linspace(-1, 1, 96).view(3, 32)
    compiled = torch.compile(fused, backend=counter)
    torch.testing.assert_close(compiled(x), model.get_submodule(part)(x))
    assert counter.frame_count == 1 and calls == []


def test_several_active_adapters(monkeypatch):
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    tiny.with_trained_b(model)
    fused = fused_copy(model)
    for each in (model, fused):
        each.base_model.set_adapter(["default", "other"])
    assert_runs_peft(model, fused, monkeypatch)
    calls = Calls(monkeypatch)
    for each in (model, fused):
        each.set_adapter("other")
    assert_equal_steps(model, fused)
    assert calls == [3, 1, 2, 1] * 2


def test_an_adapter_for_each_example(monkeypatch):
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    tiny.with_trained_b(model)
    fused, batch = fused_copy(model), tiny.causal_batch()
    names = ["default", "other", "__base__"] * 2
    calls = Calls(monkeypatch)
    with torch.no_grad():
        expected, got = (m(**batch, adapter_names=names).logits for m in (model, fused))
    assert torch.equal(got, expected) and calls == []


def test_adapters_switched_off(monkeypatch):
    model = adapted()
    fused, batch = fused_copy(model), tiny.causal_batch()
    calls = Calls(monkeypatch)
    with fused.disable_adapter(), torch.no_grad():
        assert torch.equal(fused(**batch).logits, tiny.llama()(**batch).logits)
    assert calls == []
    assert_equal_steps(model, fused)
    assert calls == [3, 1, 2, 1] * 2


def test_merged_adapters(monkeypatch):
    model = adapted()
    fused, batch = fused_copy(model), tiny.causal_batch()
    calls = Calls(monkeypatch)
    for each in (model, fused):
        each.merge_adapter()
    with torch.no_grad():
        assert torch.equal(fused(**batch).logits, model(**batch).logits)
    assert calls == []
    for each in (model, fused):
        each.unmerge_adapter()
    assert_equal_steps(model, fused)
    with torch.no_grad():
        expected, got = (m.merge_and_unload()(**batch).logits for m in (model, fused))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_within_a_layer_are_called(part, monkeypatch):
    model = adapted()
    fused, batch = fused_copy(model), tiny.causal_batch()
    for each in (model, fused):
        layer = each.get_submodule(f"base_model.model.model.layers.1.self_attn.k_proj.{part}")
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused, batch=batch)
    # A hooked base layer is called, and the update alone is fused.
    assert calls == [3, 1, 2, 1] + ([2, 1] if part == "base_layer" else [2]) + [1, 2, 1]


def test_a_forward_put_on_a_layer_is_called():
    model = adapted()
    fused, batch = fused_copy(model), tiny.causal_batch()
    for each in (model, fused):
        layer = each.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
        layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    assert_equal_steps(model, fused, batch=batch)


def test_lora_over_another_kind_of_adapter():
    with tiny.seeded(1):
        options = dict(adapter_name="default", r=2)
        base = nn.Linear(6, 5).requires_grad_(False)
        loha = LoHaLinear(base, config=LoHaConfig(init_weights=False), alpha=2, **options)
        lora = Linear(loha, config=LoraConfig(init_lora_weights=False), lora_alpha=2, **options)
    fused, x = copy.deepcopy(lora), torch.ones(2, 6)
    assert fuse(nn.ModuleDict({"layer": fused})) == 1
    torch.testing.assert_close(fused(x), lora(x))
    assert not torch.allclose(loha(x), base(x))
