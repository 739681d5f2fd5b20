import copy

import pytest
import tiny
import torch
from session import Drive, logits, prepared
from torch import nn
from torch.nn import functional

from loralloc.allocation.blocks import sublayers
from loralloc.methods.adapterdrop import AdapterDrop
from loralloc.methods.bottleneck import Bottleneck, act_in_parallel, act_sequentially
from loralloc.methods.houlsby import Houlsby
from loralloc.methods.parallel_adapter import ParallelAdapter

BUILDS = [tiny.llama, tiny.gpt2, tiny.bert_classifier, tiny.roberta_classifier]
METHODS = [Houlsby, ParallelAdapter, AdapterDrop]


class Seen:
    """A change that writes down what it was given, and adds what it is told to."""

    def __init__(self, added=None):
        self.given, self.added = [], added

    def __call__(self, z):
        self.given.append(z.detach())
        return None if self.added is None else self.added * ramp(z)


def ramp(z):
    """Not the same in every place: a norm would take that away again."""
    return torch.linspace(0, 1, z.shape[-1]).expand_as(z)


def run(model):
    with torch.no_grad():
        return model(**tiny.batch_for(model)).logits


def drawn(adapter, std=0.3):
    with torch.no_grad(), tiny.seeded(4):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=std)
    return adapter


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_formula(bias):
    adapter = drawn(Bottleneck(6, 2, activation="tanh", bias=bias, scale=3.0))
    z = torch.randn(4, 5, 6)
    down, up = (adapter.down_bias, adapter.up_bias) if bias else (0, 0)
    for example in range(4):
        for token in range(5):
            inner = torch.tanh(adapter.down @ z[example, token] + down)
            expected = 3.0 * (adapter.up @ inner + up)
            torch.testing.assert_close(adapter(z)[example, token], expected)


def test_it_begins_at_zero_and_learns():
    adapter = Bottleneck(6, 2, bias=True)
    z = torch.randn(4, 6)
    assert not adapter(z).any()
    (adapter(z) - z).square().mean().backward()
    assert adapter.up.grad.abs().max() > 0
    assert [name for name, _ in adapter.named_parameters()] == [
        "down", "up", "down_bias", "up_bias",
    ]  # fmt: skip


def test_in_bfloat16_it_computes_in_that_and_trains_in_float32():
    adapter = drawn(Bottleneck(6, 2))
    z = torch.randn(4, 6).bfloat16()
    added = adapter(z)
    added.float().sum().backward()
    assert added.dtype == torch.bfloat16
    assert adapter.down.grad.dtype == adapter.down.dtype == torch.float32
    inner = functional.relu(z.float() @ adapter.down.T)
    torch.testing.assert_close(added.float(), inner @ adapter.up.T, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("act", [act_sequentially, act_in_parallel])
def test_what_adds_nothing_changes_nothing(build, act):
    model = build()
    before = run(model)
    for sublayer in sublayers(model):
        act(sublayer, Seen())
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("act", [act_sequentially, act_in_parallel])
def test_in_llama_it_reads_and_writes_between_the_residual_sums(act):
    """Against the block written out with its own modules."""
    model = tiny.llama(num_hidden_layers=1)
    batch = tiny.batch_for(model)
    block, taken = model.model.layers[0], {}
    attention, feed_forward = sublayers(model)
    block.register_forward_pre_hook(lambda _, args: taken.update(h=args[0]))
    plain = {}
    for name, module in (("attention", block.self_attn), ("feed_forward", block.mlp)):
        module.register_forward_hook(
            lambda _, args, kwargs, out, name=name: plain.update(
                {name: ((args or (kwargs["hidden_states"],))[0], out[0] if name[0] == "a" else out)}
            ),
            with_kwargs=True,
        )
    changes = {"attention": Seen(0.5), "feed_forward": Seen(-0.25)}
    act(attention, changes["attention"])
    act(feed_forward, changes["feed_forward"])
    block.register_forward_hook(lambda _, args, out: taken.update(out=out))
    with torch.no_grad():
        model(**batch)
        h = taken["h"]
        h = h + plain["attention"][1] + 0.5 * ramp(h)
        torch.testing.assert_close(plain["feed_forward"][0], block.post_attention_layernorm(h))
        torch.testing.assert_close(taken["out"], h + plain["feed_forward"][1] - 0.25 * ramp(h))
    read = 1 if act is act_sequentially else 0
    for name, change in changes.items():
        torch.testing.assert_close(change.given[0], plain[name][read])
    torch.testing.assert_close(plain["attention"][0], block.input_layernorm(taken["h"]))


@pytest.mark.parametrize("act", [act_sequentially, act_in_parallel])
def test_in_bert_it_acts_before_the_sum_is_normalised(act):
    model = tiny.bert_classifier()
    attention, feed_forward = sublayers(model)[:2]
    block, taken = model.bert.encoder.layer[0], {}
    changes = [Seen(2.5), Seen(-1.5)]
    block.register_forward_pre_hook(lambda _, args: taken.update(h=args[0]))
    block.attention.output.dense.register_forward_hook(lambda _, __, out: taken.update(a=out))
    block.output.dense.register_forward_hook(lambda _, __, out: taken.update(f=out))
    block.register_forward_hook(lambda _, args, out: taken.update(out=out))
    act(attention, changes[0])
    act(feed_forward, changes[1])
    run(model)
    with torch.no_grad():
        h = taken["h"]
        middle = block.attention.output.LayerNorm(h + taken["a"] + 2.5 * ramp(h))
        expected = block.output.LayerNorm(middle + taken["f"] - 1.5 * ramp(h))
    torch.testing.assert_close(_first(taken["out"]), expected)
    reads = (taken["a"], taken["f"]) if act is act_sequentially else (h, middle)
    for change, read in zip(changes, reads, strict=True):
        torch.testing.assert_close(change.given[0], read)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("act", [act_sequentially, act_in_parallel])
@pytest.mark.parametrize("build", BUILDS)
def test_a_copy_of_the_model_has_its_own_adapters(build, act):
    model = build()
    for sublayer in sublayers(model):
        sublayer.owner.add_module("adapter", drawn(Bottleneck(32, 4)))
        act(sublayer, sublayer.owner.adapter)
    expected, other = run(model), copy.deepcopy(model)
    for sublayer in sublayers(model):
        sublayer.owner.adapter.up.data.zero_()
    assert not torch.allclose(run(model), expected)
    assert torch.equal(run(other), expected)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", METHODS)
def test_every_adapter_trains_and_is_used(kind, build):
    method = prepared(kind(bias=True), build())
    Drive(method).begin().train(until=8)
    batch = tiny.batch_for(method.model)
    expected = logits(method, batch)
    for sublayer in sublayers(method.model):
        adapter = sublayer.owner.adapter
        assert all(parameter.any() for parameter in adapter.parameters())
        up = adapter.up.detach().clone()
        adapter.up.data.zero_()
        assert not torch.allclose(logits(method, batch), expected)
        adapter.up.data.copy_(up)


@pytest.mark.parametrize("kind", METHODS)
def test_activations_that_are_computed_again_give_the_same_gradients(kind):
    gradients = []
    for computes_again in (False, True):
        method = prepared(kind(bottleneck=4), tiny.llama())
        Drive(method).begin()
        for sublayer in sublayers(method.model):
            nn.init.constant_(sublayer.owner.adapter.up, 0.01)
        if computes_again:
            checkpointing(method.model)
        method.model(**tiny.batch_for(method.model)).loss.backward()
        gradients.append([p.grad for p in method.adapter_parameters().values()])
    assert sum(found is not None and bool(found.any()) for found in gradients[0]) >= 4
    for expected, found in zip(*gradients, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected)


def checkpointing(model):
    # The second is the name before Transformers 5.22.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
