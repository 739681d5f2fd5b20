"""Models of Transformers attend to short sequences in our way, and to all else as they did."""

import copy
import json

import pytest
import tiny
import torch
import transformers
from lora_steps import batch_for, loss_and_gradients
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    StaticCache,
)

from loralloc.kernels import attention
from loralloc.kernels.attention import NAME, use_short_attention

MODELS = (*tiny.MODELS, tiny.t5)


@pytest.fixture
def in_float32(monkeypatch):
    """Float32 takes the short way too, so that nothing hides behind rounding."""
    monkeypatch.setattr(attention, "HALF", (torch.float32,))


@pytest.fixture
def calls(monkeypatch):
    """Queries and keys of every call of the short attention."""
    lengths, short_attention = [], attention.short_attention

    def counted(query, key, *args):
        lengths.append((query.shape[2], key.shape[2]))
        return short_attention(query, key, *args)

    monkeypatch.setattr(attention, "short_attention", counted)
    return lengths


def changed(model):
    short = copy.deepcopy(model)
    assert use_short_attention(short)
    return short


def padded_left(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {**batch, "input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


BATCHES = {
    "right": lambda batch: batch,
    "left": padded_left,
    "no-padding": lambda batch: {**batch, "attention_mask": torch.ones_like(batch["input_ids"])},
    "no-mask": lambda batch: {k: v for k, v in batch.items() if k != "attention_mask"},
}


@pytest.mark.parametrize("arrange", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("build", MODELS)
def test_loss_and_gradients_equal_those_of_the_stock_model(build, arrange, in_float32, calls):
    model = build()
    batch = arrange(batch_for(model))
    expected, got = (loss_and_gradients(m, batch) for m in (model, changed(model)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # T5 adds a bias to its scores, which is PyTorch's.
    assert bool(calls) == (build is not tiny.t5)


@pytest.mark.parametrize("build", tiny.MODELS)
def test_in_bfloat16_gradients_are_as_near_to_the_truth(build, calls):
    model = build().to(torch.bfloat16)
    truth, stock, short = (
        torch.cat([g.flatten().double() for g in loss_and_gradients(m)[1].values()])
        for m in (copy.deepcopy(model).double(), model, changed(model))
    )
    assert (short - truth).norm() < 1.5 * (stock - truth).norm() < 0.2 * truth.norm()
    assert calls


def test_examples_packed_into_one_row_do_not_see_each_other(in_float32, calls):
    model = tiny.llama()
    batch = {
        "input_ids": tiny.causal_batch(num_examples=1)["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]),
        "use_cache": False,
    }
    batch["labels"] = batch["input_ids"]
    expected, got = (loss_and_gradients(m, batch) for m in (model, changed(model)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    alone = model(batch["input_ids"][:, 5:8]).logits
    torch.testing.assert_close(changed(model)(**batch).logits[:, 5:8], alone, rtol=1e-4, atol=1e-5)
    assert calls == [(12, 12)] * 4


def test_gradient_checkpointing_gives_the_same_gradients(in_float32):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    short = copy.deepcopy(model)
    assert use_short_attention(short.get_base_model())
    tiny.checkpointing(short).train()
    expected, got = (loss_and_gradients(m) for m in (model.train(), short))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_what_the_stock_model_does(build, num_beams, use_cache, in_float32, calls):
    model = build()
    batch = padded_left(tiny.causal_batch(num_examples=3, length=6))
    del batch["labels"]
    options = dict(max_new_tokens=8, do_sample=False, num_beams=num_beams, use_cache=use_cache)
    expected, got = (m.generate(**batch, **options) for m in (model, changed(model)))
    assert torch.equal(got, expected)
    # With a cache the prompt alone has several queries.
    assert set(calls) == {(n, n) for n in (range(6, 7) if use_cache else range(6, 14))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tokens_after_a_cached_beginning(dtype, in_float32, calls, monkeypatch):
    monkeypatch.setattr(attention, "HALF", (dtype,))
    ids = tiny.causal_batch(num_examples=2)["input_ids"]
    model = tiny.llama().to(dtype)
    results = []
    for m in (model, changed(model)):
        with torch.no_grad():
            cache = m(ids[:, :5], use_cache=True).past_key_values
            results.append(m(ids[:, 5:], past_key_values=cache).logits)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    assert calls == [(5, 5)] * 2 + [(7, 12)] * 2


def test_a_static_cache_with_room_to_spare(in_float32, calls):
    ids = tiny.causal_batch(num_examples=2)["input_ids"]
    results = []
    for m in (tiny.llama(), changed(tiny.llama())):
        with torch.no_grad():
            cache = StaticCache(config=m.config, max_cache_len=20)
            results.append(m(ids, past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert calls == [(12, 20)] * 2


def assert_runs_pytorch(model, short, calls, batch=None):
    expected, got = (loss_and_gradients(m, batch) for m in (model, short))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert calls == []


def test_long_sequences_run_the_kernel_of_pytorch(calls, monkeypatch):
    model = tiny.llama().to(torch.bfloat16)
    monkeypatch.setattr(attention, "LONGEST", 11)  # the batch has 12
    assert_runs_pytorch(model, changed(model), calls)
    monkeypatch.setattr(attention, "LONGEST", 12)
    loss_and_gradients(changed(model))
    assert calls == [(12, 12)] * 2


def test_dropout_runs_the_kernel_of_pytorch(calls):
    model = tiny.bert_classifier(attention_probs_dropout_prob=0.5).to(torch.bfloat16).train()
    assert_runs_pytorch(model, changed(model), calls)
    loss_and_gradients(changed(model).eval())
    assert len(calls) == 2


@pytest.mark.parametrize("build", MODELS)
def test_float32_runs_the_kernel_of_pytorch(build, calls):
    model = build()
    assert_runs_pytorch(model, changed(model), calls)


def test_a_model_that_is_made_float32_later_runs_the_kernel_of_pytorch(calls):
    model = tiny.llama().to(torch.bfloat16)
    short = changed(model).float()
    assert_runs_pytorch(model.float(), short, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", tiny.MODELS)
def test_under_autocast_gradients_are_as_near_to_the_truth(build, dtype, calls):
    squared = [0.0, 0.0]
    for seed in range(4):
        model = tiny.with_trained_b(tiny.adapted(build()), seed=seed)
        truth = in_one_row(model)
        model.get_base_model().to(dtype)
        short = copy.deepcopy(model)
        assert use_short_attention(short.get_base_model())
        for index, each in enumerate((short, model)):
            with torch.autocast("cpu", torch.bfloat16):
                squared[index] += float((in_one_row(each) - truth).norm() ** 2)
    assert squared[0] < 1.2**2 * squared[1] < (0.2 * truth.norm()) ** 2
    assert calls == [(12, 12)] * 2 * 4


def in_one_row(model):
    return torch.cat([g.flatten().double() for g in loss_and_gradients(model)[1].values()])


def test_probabilities_are_float32_within_autocast_too(calls):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 9, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)
    )
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            attended = attention.short_attention(q, k, v, None, 0.3)
            gradients = torch.autograd.grad(attended.square().sum(), (q, k, v))
        results.append((attended, *gradients))
    assert all(map(torch.equal, *results))


def test_a_mask_of_numbers_runs_the_kernel_of_pytorch(calls):
    model, batch = tiny.llama().to(torch.bfloat16), tiny.causal_batch()
    mask = torch.full((6, 1, 12, 12), -100.0, dtype=torch.bfloat16).triu(1)
    assert_runs_pytorch(model, changed(model), calls, {**batch, "attention_mask": mask})


@pytest.mark.skipif(
    transformers.__version__ < "5.21",  # the last for Python 3.10 is 5.20
    reason="Transformers before 5.21 gives Gemma 2 the kernel of PyTorch, which knows no cap",
)
def test_capped_scores_are_refused_as_pytorch_refuses_them(calls):
    options = dict(vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2)
    model = Gemma2ForCausalLM(Gemma2Config(**options, **heads)).to(torch.bfloat16)
    assert not use_short_attention(model)  # Transformers gives it no kernel
    model.config._attn_implementation = "sdpa"
    use_short_attention(model)
    with pytest.raises(ValueError, match="softcap"):
        model(**tiny.causal_batch())
    assert calls == []


def test_learned_queries_shared_by_the_batch_run_the_kernel_of_pytorch(calls):
    query, key = torch.randn(1, 4, 3, 8).bfloat16(), torch.randn(2, 4, 5, 8).bfloat16()
    module = torch.nn.Module()
    module.is_causal = False
    output, _ = attention._attention(module, query, key, key, None)
    assert output.shape == (2, 3, 4, 8) and calls == []


def falcon():
    options = dict(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1)
    return FalconForCausalLM(FalconConfig(num_attention_heads=4, **options)).to(torch.bfloat16)


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny.llama().to(torch.bfloat16).to("meta"),
        lambda: tiny.llama(attn_implementation="eager").to(torch.bfloat16),
        falcon,
    ],
    ids=["not-on-a-cpu", "eager", "attention-of-its-own"],
)
def test_other_models_are_left_as_they_are(build, caplog):
    model = build()
    before = model.config._attn_implementation
    assert use_short_attention(model) is False
    assert model.config._attn_implementation == before != NAME
    assert not caplog.records


def test_a_second_time_changes_nothing():
    model = tiny.llama().to(torch.bfloat16)
    assert use_short_attention(model) and not use_short_attention(model)


def test_saved_models_open_in_the_stock_library(tmp_path):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama().to(torch.bfloat16)))
    use_short_attention(model.get_base_model())
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for path in tmp_path.rglob("*.json"):
        assert NAME not in path.read_text(), path
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert opened.config._attn_implementation == "sdpa"
    assert NAME not in json.dumps(opened.config.to_dict(), default=str)
    batch = tiny.causal_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            opened(**batch).logits, merged(**batch).logits, rtol=0.05, atol=0.2
        )
