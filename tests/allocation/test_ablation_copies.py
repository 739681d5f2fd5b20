"""Ablations that share a forward pass measure what each of them measures in a pass of its own."""

import pytest
import rounding
import tiny
import torch
from transformers import (
    BertForQuestionAnswering,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from loralloc.allocation.importance import ablation, copies
from loralloc.allocation.layers import base_model, lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits
from loralloc.kernels.lora import fuse

NUM_BLOCKS, R = 3, 2
MANY = 10_000
"""Tokens of a forward pass, enough for as many copies as there are blocks."""


@pytest.fixture
def measured(monkeypatch):
    """Scores with so many tokens a forward pass at most, and how many passes they took."""

    def measure(model, batches, most_tokens):
        monkeypatch.setattr(copies, "MOST_TOKENS", {"cpu": most_tokens})
        passes = []
        handle = base_model(model).register_forward_pre_hook(lambda *_: passes.append(1))
        objective = Objective(model, batches)
        scores = ablation.score(objective, weights_b(lora_layers(model)), Limits(num_pruned=1))
        handle.remove()
        return scores, len(passes)

    return measure


@pytest.fixture
def passes_saved(measured):
    """Passes one by one over passes together, where the scores are alike."""

    def check(model, *batches):
        one_by_one, most_passes = measured(model, batches, 1)
        together, num_passes = measured(model, batches, MANY)
        assert (together.s_full, together.s_base) == (one_by_one.s_full, one_by_one.s_base)
        atol = rounding.of_losses(model, one_by_one.s_base, one_by_one.s_full)
        for term, by_module in one_by_one.terms.items():
            torch.testing.assert_close(together.terms[term], by_module, rtol=0, atol=atol)
            assert max(float(x.abs().max()) for x in by_module.values()) > 100 * atol
        return most_passes / num_passes

    return check


def adapted(model, **options):
    return tiny.with_trained_b(tiny.adapted(model, r=R, **options), 0.3)


def llama(**options):
    return tiny.llama(num_hidden_layers=NUM_BLOCKS, **options)


def gpt2():
    return tiny.gpt2(n_layer=NUM_BLOCKS)


def bert(**options):
    return tiny.bert_classifier(num_hidden_layers=NUM_BLOCKS, **options)


def roberta():
    return tiny.roberta_classifier(num_hidden_layers=NUM_BLOCKS)


def opt():
    """Its feed-forward layers read (tokens, features), without a dimension for the examples."""
    config = OPTConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.15,
        dropout=0.0,
        pad_token_id=tiny.PADDING,
    )
    with tiny.seeded(0):
        return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2, bert, roberta])
def test_of_every_kind_of_model(build, is_fused, passes_saved):
    model = adapted(build())
    if is_fused:
        assert fuse(model) > 0
    # Three copies: 14, 12 or 8 ranks of a block take 5, 4 or 3 passes.
    assert passes_saved(model, *tiny.micro_batches(tiny.batch_for(model), 4)) > 2.3


def test_of_blocks_that_put_out_more_than_hidden_states(passes_saved):
    options = dict(n_embd=32, n_layer=NUM_BLOCKS, n_head=4, rotary_dim=4, n_positions=64)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = dict(bos_token_id=1, eos_token_id=2, initializer_range=0.15)
    config = GPTJConfig(vocab_size=tiny.VOCABULARY, **options, **off, **ids)
    with tiny.seeded(0):
        model = GPTJForCausalLM(config).eval()
    put_out = model.transformer.h[0](torch.zeros(1, 2, 32), position_ids=torch.arange(2)[None])
    assert isinstance(put_out, tuple)
    model = adapted(model, target_modules=["v_proj", "fc_in"], task_type="CAUSAL_LM")
    assert passes_saved(model, tiny.causal_batch()) > 1.8  # four ranks a block in two passes


@pytest.mark.parametrize("build", [llama, bert])
def test_of_micro_batches_of_one_example(build, passes_saved):
    model = adapted(build())
    assert passes_saved(model, *tiny.micro_batches(tiny.batch_for(model, 2), 1)) > 2.3


def with_positions(batch):
    """Other steps between the positions in every other row."""
    steps = 1 + torch.arange(len(batch["labels"]))[:, None] % 2
    return {**batch, "position_ids": torch.arange(12) * steps + 3}


def with_positions_of_one_row(batch):
    return {**batch, "position_ids": torch.arange(12)[None] * 3}


def with_more_padding(batch):
    """Padding on the left, more than the longest example needs."""
    fill = {"input_ids": tiny.PADDING, "attention_mask": 0, "labels": tiny.IGNORED}
    return {
        key: torch.cat([torch.full((len(value), 5), fill[key]), value], dim=1)
        for key, value in batch.items()
    }


def packed(batch):
    """All examples in one row without padding, told apart by positions that begin anew."""
    real = batch["attention_mask"].bool()
    tokens = {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "position_ids": torch.arange(12).expand(real.shape),
    }
    return {key: value[real][None] for key, value in tokens.items()}


CAUSAL_BATCHES = (with_positions, with_positions_of_one_row, with_more_padding, packed)


@pytest.mark.parametrize("change", CAUSAL_BATCHES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_of_every_kind_of_causal_batch(build, change, passes_saved):
    assert passes_saved(adapted(build()), change(tiny.causal_batch())) > 2.3


def test_of_pairs_of_texts(passes_saved):
    types = torch.arange(12).ge(torch.arange(6)[:, None] + 3).long()
    assert (
        passes_saved(adapted(bert()), {**tiny.classification_batch(), "token_type_ids": types})
        > 2.3
    )


def span_batch():
    batch = tiny.classification_batch()
    del batch["labels"]
    begins = torch.arange(6) % 3
    return {**batch, "start_positions": begins, "end_positions": begins + torch.arange(6) % 2}


def test_of_spans(passes_saved):
    model = BertForQuestionAnswering(bert(num_labels=2).config).eval()
    model = adapted(model, task_type="QUESTION_ANS")
    assert passes_saved(model, span_batch()) > 2.3


def test_under_activation_checkpointing(passes_saved):
    model = tiny.checkpointing(adapted(llama())).train()
    assert passes_saved(model, tiny.causal_batch()) > 2.3


def test_under_a_head_that_changes_its_logits(passes_saved):
    model = adapted(llama())
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, logits: logits.tanh())
    assert passes_saved(model, tiny.causal_batch()) > 2.3


def test_layers_that_read_tokens_without_examples_take_turns(passes_saved):
    model = adapted(opt(), target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    # A block's ranks: those of q_proj in one pass, and one for each of fc1's.
    assert passes_saved(model, tiny.causal_batch()) == pytest.approx((1 + 4 * 3) / (1 + 3 * 3))


@pytest.mark.parametrize("outside", ["lm_head", "pooler.dense"])
def test_layers_outside_the_blocks_take_turns(outside, passes_saved):
    model = llama() if outside == "lm_head" else bert()
    model = adapted(model, target_modules=["o_proj", "attention.output.dense", outside])
    saved = passes_saved(model, tiny.batch_for(model))
    assert saved == pytest.approx((1 + R * 3 + R) / (1 + 3 + R))


@pytest.mark.parametrize("build", [tiny.t5, lambda: bert(num_labels=1)], ids=["t5", "regression"])
def test_a_loss_that_only_the_model_knows_is_taken_one_by_one(build, passes_saved):
    model = adapted(build())
    batch = tiny.batch_for(model)
    if batch["labels"].ndim == 1:
        batch["labels"] = torch.linspace(-1, 1, 6)
    assert passes_saved(model, batch) == 1


def test_as_many_copies_as_pay_and_fit(monkeypatch):
    monkeypatch.setattr(copies, "MOST_TOKENS", {"cpu": 200})
    batch, shape = tiny.causal_batch(), torch.Size((6, 12, 32))  # 72 tokens

    def number(batch=batch, shape=shape, device="cpu", num_blocks=30):
        return copies.num_copies(batch, shape, device=device, num_blocks=num_blocks)

    assert number() == 2
    assert number(num_blocks=1) == 1
    assert number(device="cuda") == 30
    assert number(device="cuda", num_blocks=99) == copies.MOST_TOKENS_ELSEWHERE // 72
    assert number(tiny.causal_batch(1), torch.Size((1, 12, 32))) == 16
    assert number(shape=torch.Size((6, 120, 32))) == 1  # longer than pays
    for other in ((72, 32), (6, 32), (12, 6, 32)):  # tokens; rows of an expert; length first
        assert number(shape=torch.Size(other)) == 1


def test_a_batch_with_more_than_rows_of_examples_is_not_copied():
    packed_batch = {**packed(tiny.causal_batch()), "cu_seq_lens_q": torch.tensor([0, 12, 20])}
    shape = torch.Size((*packed_batch["labels"].shape, 32))
    assert copies.num_copies(packed_batch, shape, device="cuda", num_blocks=30) == 1
    del packed_batch["cu_seq_lens_q"]
    assert copies.num_copies(packed_batch, shape, device="cuda", num_blocks=30) == 30
