import backbones
import pytest
import tiny
import torch
from session import logits, prepared

from loralloc.allocation.blocks import sublayers
from loralloc.methods.parallel_adapter import ParallelAdapter


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 20_971_520), ("roberta-large", 3_932_160), ("gpt2-large", 7_372_800)],
)
def test_the_papers_setting_has_the_papers_parameters(name, parameters):
    model = backbones.build(name)
    method = ParallelAdapter(**ParallelAdapter.paper)
    assert method.count(model, method.bottleneck) == parameters
    assert prepared(method, model).num_trained() == parameters


def test_it_stands_beside_the_sublayer():
    """One block written out: attention and feed-forward read what the adapters read."""
    model = tiny.llama(num_hidden_layers=1)
    method = prepared(ParallelAdapter(bottleneck=4, scale=2.5), model)
    block = model.model.layers[0]
    for sublayer in sublayers(model):
        with tiny.seeded(sublayer.kind == "attention"):
            torch.nn.init.normal_(sublayer.owner.adapter.up, std=0.3)
    seen = {}
    block.register_forward_hook(lambda _, args, out: seen.update(h=args[0], out=out))
    attention, mlp = block.self_attn.adapter, block.mlp.adapter
    given = {}
    block.self_attn.register_forward_hook(
        lambda _, args, kwargs, out: given.update(
            y=out[0] - 2.5 * by_hand(attention, kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    logits(method, tiny.batch_for(model))
    with torch.no_grad():
        x = block.input_layernorm(seen["h"])
        h = seen["h"] + given["y"] + 2.5 * by_hand(attention, x)
        x = block.post_attention_layernorm(h)
        plain = block.mlp.down_proj(
            torch.nn.functional.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
        )
        expected = h + plain + 2.5 * by_hand(mlp, x)
    torch.testing.assert_close(seen["out"], expected)


def by_hand(adapter, x):
    return torch.relu(x @ adapter.down.T) @ adapter.up.T


def test_feed_forward_layers_may_have_a_scale_of_their_own():
    model = tiny.llama()
    prepared(ParallelAdapter(ffn_scale=4.0), model)
    found = {(part.kind, part.owner.adapter.scale) for part in sublayers(model)}
    assert found == {("attention", 1.0), ("feed_forward", 4.0)}
