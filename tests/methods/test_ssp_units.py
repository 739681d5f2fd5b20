"""SSP's units: what each adds, where they are, and how many parameters the space has."""

import copy

import pytest
import tiny
import torch
from session import BUILDS
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from loralloc.methods.peft_method import resolve_targets
from loralloc.methods.ssp.units import (
    AdapterUnit,
    BiasUnit,
    LoraUnit,
    NormUnit,
    search_space,
)


def drawn(unit):
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    return unit.requires_grad_(False)


def space_of(model, rank=2, max_parameters=3000):
    targets = resolve_targets(model, None)
    return search_space(model, rank=rank, max_parameters=max_parameters, scale=2.0, targets=targets)


@pytest.fixture
def x():
    with tiny.seeded(4):
        yield torch.randn(3, 5, 8)


def test_lora_is_a_low_rank_change_of_the_weight(x):
    host, unit = nn.Linear(8, 6), drawn(LoraUnit(8, 6, rank=2, scale=3.0))
    changed = functional.linear(x, host.weight + 3 * unit.b @ unit.a, host.bias)
    torch.testing.assert_close(unit(host(x), x), changed)


def test_a_bias_is_added_to_the_layers_own(x):
    host, unit = nn.Linear(8, 6), drawn(BiasUnit(6))
    changed = functional.linear(x, host.weight, host.bias + unit.shift)
    torch.testing.assert_close(unit(host(x), x), changed)


@pytest.mark.parametrize("build", [nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm])
def test_a_norms_offset_is_added_to_its_weight(x, build):
    host = build(8, eps=1e-2)
    unit, changed = drawn(NormUnit(host)), copy.deepcopy(host)
    changed.weight.data += unit.offset
    torch.testing.assert_close(unit(host(x), x), changed(x))


def test_an_adapter_reads_what_it_adds_to(x):
    unit = drawn(AdapterUnit(8, 3))
    added = functional.gelu(x @ unit.adapter.down.T) @ unit.adapter.up.T
    torch.testing.assert_close(unit(x), x + added)


@pytest.mark.parametrize(
    "unit",
    [
        LoraUnit(8, 8, rank=2, scale=1.0),
        BiasUnit(8),
        NormUnit(nn.LayerNorm(8)),
        AdapterUnit(8, 3),
    ],
    ids=lambda unit: type(unit).__name__,
)
def test_the_gate_of_the_mode_multiplies_what_is_added(x, unit):
    whole = drawn(unit)(x, x) - x
    unit.sampled, unit.expected = torch.tensor(0.25), torch.tensor(0.75)
    torch.testing.assert_close(unit.train()(x, x) - x, 0.25 * whole)
    torch.testing.assert_close(unit.eval()(x, x) - x, 0.75 * whole)


@pytest.mark.parametrize("shape", BUILDS)
def test_the_space_is_in_every_block_and_about_twice_what_is_kept(shape):
    model = BUILDS[shape]()
    space = space_of(model, max_parameters=5000)
    kinds = [candidate.name.rpartition(".ssp_")[2] for candidate in space]
    linears = {"llama": 14, "gpt2": 8, "roberta": 12}[shape]
    assert kinds.count("lora") == kinds.count("bias") == linears
    assert kinds.count("norm") == 5
    assert kinds.count("adapter") == 4
    assert not any("head" in c.name or "classifier" in c.name for c in space)
    for candidate in space:
        unit = candidate.build()
        assert sum(p.numel() for p in unit.parameters()) == candidate.size
    # One more in every bottleneck is 4 adapters' 2 * 32.
    assert abs(sum(candidate.size for candidate in space) - 10_000) <= 4 * 2 * 32 / 2


@pytest.mark.parametrize("shape", BUILDS)
def test_every_unit_changes_what_the_model_computes(shape):
    model = BUILDS[shape]()
    batch = tiny.batch_for(model)
    with torch.no_grad():
        plain = model(**batch).logits
        for candidate in space_of(model):
            with tiny.seeded(5):
                handle = candidate.act(drawn(candidate.build()))
            # Keys' biases cancel in the softmax.
            is_idle = candidate.name.endswith(("k_proj.ssp_bias", "key.ssp_bias"))
            found = model(**batch).logits
            assert is_idle or not torch.allclose(found, plain, atol=1e-3), candidate.name
            handle.remove()
            assert torch.equal(model(**batch).logits, plain)


def test_gpt2s_linear_layers_hold_their_weights_the_other_way_round():
    host = tiny.gpt2().transformer.h[0].mlp.c_fc
    assert isinstance(host, Conv1D)
    assert host.weight.shape == (32, 128)
    (candidate,) = (c for c in space_of(tiny.gpt2()) if c.name.endswith("0.mlp.c_fc.ssp_lora"))
    assert candidate.build().a.shape == (2, 32)
