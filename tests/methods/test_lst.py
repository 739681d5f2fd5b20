"""LST: its equations, its counts, what a training step holds, and its keys and values."""

import copy

import pytest
import reference.lst
import session
import tiny
import torch
from session import BUILDS, Drive, logits, prepared
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from loralloc.allocation.blocks import blocks
from loralloc.allocation.supervised import IGNORED, SupervisedLoss
from loralloc.methods.lora import Lora
from loralloc.methods.lst.method import Lst
from loralloc.methods.lst.narrow import side_heads, side_widths
from loralloc.methods.lst.prune import _kept_of_heads

SHAPES = sorted(BUILDS)


def meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


LLAMA_2_7B = LlamaConfig()
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
ROBERTA_LARGE = RobertaConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


# --- the equations


class Given(nn.Module):
    """In the place of embeddings: the stream itself."""

    def forward(self, inputs_embeds=None, **_):
        return inputs_embeds


def alone(side, config, mask):
    """A side block as the only block of a model of Transformers, which makes mask and positions."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    with tiny.seeded(0):
        if config.model_type == "llama":
            model = LlamaModel(config)
            model.layers, model.norm = nn.ModuleList([side]), nn.Identity()
        elif config.model_type == "gpt2":
            model = GPT2Model(config)
            model.h, model.ln_f = nn.ModuleList([side]), nn.Identity()
            nn.init.zeros_(model.wpe.weight)
        else:
            model = RobertaModel(config, add_pooling_layer=False)
            model.encoder.layer, model.embeddings = nn.ModuleList([side]), Given()
    model.eval()
    return lambda s: model(inputs_embeds=s, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("init", ["pruned", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_ladder_of_the_paper(shape, init):
    base, method = BUILDS[shape](), prepared(Lst(width=16, init=init), BUILDS[shape]())
    ladder = method.model.ladder
    with torch.no_grad(), tiny.seeded(4):
        for parameter in ladder.parameters():  # off the start, where gates and biases are zero
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    batch = tiny.batch_for(base)
    seen = []
    blocks(base)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for block in blocks(base):
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    ladder.eval()
    with torch.no_grad():
        base(**batch)
        last = reference.lst.climb(
            seen[0],
            seen[1:],
            downs=list(ladder.downs),
            gates=ladder.gates.tolist(),
            blocks=[alone(s, ladder.config, batch["attention_mask"]) for s in ladder.blocks],
            norm=ladder.norm or nn.Identity(),
            up=ladder.up,
        )
        expected = base.classifier(last) if shape == "roberta" else base.lm_head(last)
    if expected.ndim == 3:
        expected = expected[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits(method, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [*BUILDS.values(), tiny.bert_classifier])
def test_as_wide_as_the_backbone_and_with_closed_gates_it_is_the_backbone(build):
    base, method = build(), prepared(Lst(width=32), build())
    nn.init.constant_(method.model.ladder.gates, 10.0)  # mu = 1: nothing of h_i is let in
    batch = tiny.batch_for(base)
    with torch.no_grad():
        expected = base(**batch).logits
    if expected.ndim == 3:
        expected = expected[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits(method, batch), expected, atol=1e-5, rtol=1e-5)


def test_the_largest_channels_of_the_backbone_are_kept():
    model = tiny.llama()
    kept, inner = [1, 2, 5, 8, 13, 21, 30, 31], [0, 3, 4, 7, 9, 11, 20, 23, 24, 30, 41, 47]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[kept] *= 50
            block.mlp.up_proj.weight[inner] *= 20
    first = model.model.layers[0].mlp
    method = prepared(Lst(width=8), model)
    side = method.model.ladder.blocks[0].mlp
    expected = first.down_proj.weight[kept][:, inner]
    assert torch.equal(side.down_proj.weight, expected)
    assert torch.equal(side.up_proj.weight, first.up_proj.weight[inner][:, kept])
    hidden = torch.arange(32.0)[None, None]
    for down in method.model.ladder.downs:
        assert down(hidden).flatten().tolist() == kept
    assert method.model.ladder.up(torch.ones(1, 8)).flatten().nonzero().flatten().tolist() == kept


def test_heads_are_kept_with_the_keys_they_see_and_pairs_that_turn_alike():
    model = tiny.llama()  # 4 heads of width 8, of which two and two share keys
    block = model.model.layers[0]
    with torch.no_grad():
        block.self_attn.q_proj.weight[8:16] *= 50  # the second head
        block.self_attn.o_proj.weight[:, 24:] *= 50  # the fourth
    narrow = LlamaConfig(hidden_size=8, num_attention_heads=2)
    found = _kept_of_heads(block, model.config, narrow)
    # Pairs (0, 4) and (2, 6) of four turn by 1 and theta^-1/2, as both pairs of a head of width 4.
    assert found["query"].tolist() == [8, 10, 12, 14, 24, 26, 28, 30]
    assert found["key"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


# --- counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [(Lst.paper, 21_277_468), ({"width": 128}, 24_166_688)],
    ids=["paper", "all blocks"],
)
def test_parameters_on_llama_2_7b(options, expected):
    model, method = meta(LlamaForCausalLM, LLAMA_2_7B), Lst(**options)
    assert method.count(model, method.width) == expected


@pytest.mark.parametrize("width", [64, 128])
def test_parameters_on_roberta_large(width):
    model = meta(RobertaForSequenceClassification, ROBERTA_LARGE)
    inner, hidden = 4 * width, 1024
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    down, up = hidden * width + width, width * hidden + hidden
    assert Lst().count(model, width) == 25 * down + 24 * (1 + block) + up


@pytest.mark.parametrize("width", [80, 120])
def test_parameters_on_gpt2_large(width):
    model = meta(GPT2LMHeadModel, GPT2_LARGE)
    inner, hidden = 4 * width, 1280
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    down, up = hidden * width + width, width * hidden + hidden
    assert Lst().count(model, width) == 37 * down + 36 * (1 + block) + 2 * width + up


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_counted_is_what_trains(shape):
    method = prepared(Lst(drop_every=2), BUILDS[shape](), budget=4000)
    assert method.num_trained() == method.count(BUILDS[shape](), method.width)


@pytest.mark.parametrize(("budget", "width"), [(3_538_944, 72), (2_900_000, 64), (8_100_000, 128)])
def test_a_budget_chooses_the_nearest_width(budget, width):
    model, method = meta(RobertaForSequenceClassification, ROBERTA_LARGE), Lst()
    method.fit(model, budget)
    counts = {w: Lst().count(model, w) for w in range(8, 200, 8)}
    assert method.width == width == min(counts, key=lambda w: abs(counts[w] - budget))
    assert method.count(model, width) == pytest.approx(budget, rel=1e-3)  # by the inner width


def test_a_width_or_inner_width_that_is_given_stays():
    model = meta(RobertaForSequenceClassification, ROBERTA_LARGE)
    given = Lst(width=64)
    given.fit(model, 3_538_944)
    assert (given.width, given.inner) == (64, None)
    narrow = Lst(inner=10)
    narrow.fit(model, 3_538_944)
    assert narrow.inner == 10
    assert narrow.width > 72


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(ValueError, match=r"budget is 900 .*`width` of 8 has 2,210"):
        Lst().fit(tiny.llama(), 900)


def test_widths_split_into_heads_of_even_width():
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    assert [side_heads(config, width) for width in (8, 56, 64, 72, 80)] == [4, 7, 8, 9, 8]
    for width in side_widths(config):
        heads = side_heads(config, width)
        assert width % heads == 0 and (width // heads) % 2 == 0 and width // heads <= 64


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 12}, "`width` is 12; .* multiple of 8 up to 32"),
        ({"width": 40}, "`width` is 40; .* up to 32"),
        ({"drop_every": 1}, "`drop_every` is 1, .* at least 2"),
        ({"init": "fisher"}, "`init` is 'fisher'; .* 'pruned' or 'random'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepared(Lst(**options), tiny.llama())


def test_dropped_side_blocks_are_the_first_of_every_n():
    method = prepared(Lst(width=8, drop_every=3), tiny.llama(num_hidden_layers=7))
    assert method.model.ladder.beside == [1, 2, 4, 5]
    assert len(method.model.ladder.blocks) == len(method.model.ladder.gates) == 4


# --- what a training step holds


@pytest.mark.parametrize("shape", SHAPES)
def test_no_graph_of_the_backbone_is_made(shape):
    model, seen = BUILDS[shape](), []
    for block in blocks(model):
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    method = prepared(Lst(width=8), model)
    model.enable_input_require_grads()  # as others ask for who compute activations again
    loss = model(**tiny.batch_for(model)).loss
    assert [out.requires_grad for out in seen[: len(blocks(model))]] == [False, False]
    loss.backward()
    assert all(p.grad is not None for p in method.adapter_parameters().values())


def saved_bytes(method, batch):
    """What a forward pass keeps for the backward pass, besides the model's own tensors."""
    own = {p.untyped_storage().data_ptr() for p in method.model.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.model(**batch)
        return sum(kept.values())


def test_a_step_keeps_far_less_than_that_of_lora():
    def model():
        return tiny.llama(hidden_size=128, intermediate_size=256, num_hidden_layers=4)

    batch = tiny.causal_batch(num_examples=8, length=32)
    batch.pop("labels")  # the head is the same for both
    lora, lst = (prepared(method, model(), budget=60_000) for method in (Lora(), Lst()))
    assert saved_bytes(lst, batch) < 0.5 * saved_bytes(lora, batch)


def test_gradient_checkpointing_is_refused():
    model = tiny.llama()
    # The second is the name before Transformers 5.22.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    method = prepared(Lst(width=8), model)
    with pytest.raises(ValueError, match="`gradient_checkpointing` saves nothing with lst"):
        Drive(method).begin()


def test_in_bfloat16_the_weights_are_float32_and_train():
    method = prepared(Lst(width=16), tiny.llama().bfloat16())
    assert {p.dtype for p in method.adapter_parameters().values()} == {torch.float32}
    assert method.model(**tiny.batch_for(method.model)).logits.dtype == torch.bfloat16
    losses = Drive(method).begin().train(until=15)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in method.adapter_parameters().values()} == {torch.float32}


def test_the_loss_at_supervised_positions_is_the_same():
    method = prepared(Lst(width=16), tiny.llama())
    batch = tiny.batch_for(method.model)
    loss = SupervisedLoss(method.model)
    assert loss.is_bounded(batch)
    found = loss(batch)
    whole = method.model(**batch).loss * (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(found.total, whole)
    found.total.backward()
    assert all(p.grad is not None for p in method.adapter_parameters().values())


# --- keys and values


@torch.enable_grad()
def trained(model):
    method = prepared(Lst(width=16), model)
    Drive(method).begin().train(until=20)
    method.model.eval()
    return method.model


PROMPTS = torch.tensor([[5, 8, 21, 30, 4, 9], [7, 6, 20, 33, 9, 4]])


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_prompt_may_be_read_in_pieces_and_taken_back(shape):
    model = trained(BUILDS[shape]())
    whole = model(PROMPTS).logits
    cache = model(PROMPTS[:, :4], use_cache=True).past_key_values
    assert len(cache) == 4
    model(PROMPTS.flip(1)[:, :2], past_key_values=cache)
    cache.crop(-2)
    found = model(PROMPTS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, 4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_lacks_the_side_blocks_is_refused():
    cache = tiny.llama()(PROMPTS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled by the backbone alone"):
        trained(tiny.llama())(PROMPTS, past_key_values=cache)


def test_a_cache_of_fixed_size_is_refused():
    model = trained(tiny.llama())
    with pytest.raises(ValueError, match=r'StaticCache, .* `cache_implementation="dynamic"`'):
        model.generate(PROMPTS, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_a_side_block_forgets_what_its_block_forgets():
    config = MistralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, pad_token_id=tiny.PADDING,
    )  # fmt: skip
    model = trained(tiny._build(MistralForCausalLM, config))
    options = dict(max_new_tokens=8, do_sample=False, num_beams=3)
    cached = model.generate(PROMPTS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **options))
    cache = model(PROMPTS, use_cache=True).past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {3}


# --- its place in the model


@torch.no_grad()
def test_hidden_states_are_counted_as_ever():
    model = trained(tiny.llama())
    assert len(model(PROMPTS, output_hidden_states=True).hidden_states) == 3


@torch.no_grad()
def test_a_copy_has_a_ladder_of_its_own():
    model = trained(tiny.llama())
    before, other = model(PROMPTS).logits, copy.deepcopy(model)
    nn.init.zeros_(other.ladder.up.weight)
    nn.init.zeros_(other.ladder.up.bias)
    assert torch.equal(model(PROMPTS).logits, before)
    assert not other(PROMPTS).logits.any()


@torch.no_grad()
def test_it_attends_as_the_backbone_is_told_to():
    model = trained(tiny.llama())
    expected = model(PROMPTS).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(PROMPTS).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.ladder.blocks[0].self_attn.config._attn_implementation == "eager"


def test_bert_pools_the_side_output():
    method = prepared(Lst(width=8), tiny.bert_classifier())
    batch = tiny.batch_for(method.model)
    before = session.logits(method, batch)
    nn.init.zeros_(method.model.ladder.up.weight)
    assert not torch.allclose(session.logits(method, batch), before)
