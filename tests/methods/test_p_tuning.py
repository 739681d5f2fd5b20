import backbones
import pytest
import tiny
import torch
from peft import PeftModel, TaskType
from session import Drive, logits, prepared
from transformers import RobertaConfig, RobertaForQuestionAnswering

from loralloc.allocation.supervised import SupervisedLoss, supervised_logits
from loralloc.kernels.attention import use_short_attention
from loralloc.methods.p_tuning import PTuning


def prompt_of(method):
    return method.model.prompt_encoder["default"].embedding.weight


@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [
        ("llama-2-7b", 80, 20_971_520),
        ("roberta-large", 80, 3_932_160),
        ("roberta-large", 160, 7_864_320),
        ("gpt2-large", 80, 7_372_800),
        ("gpt2-large", 160, 14_745_600),
    ],
)
def test_the_papers_setting_has_the_papers_parameters(name, tokens, parameters):
    assert PTuning.paper == {"virtual_tokens": 80}
    model = backbones.build(name)
    assert PTuning().count(model, tokens) == parameters
    assert prepared(PTuning(virtual_tokens=tokens), model).num_trained() == parameters


def test_the_native_size_is_the_authors_whatever_the_budget():
    method = PTuning(native=True)
    method.fit(tiny.llama(), 1_000_000)
    assert method.virtual_tokens == 20
    assert PTuning(**method.options()) == method
    with pytest.raises(ValueError, match="`native` takes 20 tokens, but `virtual_tokens` is 8"):
        PTuning(native=True, virtual_tokens=8)


def test_shared_keys_and_values_are_learned_once():
    """The tiny Llama has 4 heads of width 8 and 2 pairs of keys and values."""
    assert PTuning().count(tiny.llama(), 5) == 5 * 2 * 2 * 2 * 8
    wide = tiny.llama(head_dim=16)
    assert prepared(PTuning(virtual_tokens=5), wide).num_trained() == PTuning().count(wide, 5)


def test_the_first_weights_are_normal():
    prompt = prompt_of(prepared(PTuning(virtual_tokens=50, init_std=0.5), tiny.llama()))
    assert prompt.std().item() == pytest.approx(0.5, rel=0.05)
    assert prompt.dtype == torch.float32


def test_in_llama_it_is_attention_to_more_keys_and_values():
    """One attention layer written out, against the model with the prefix."""
    model = tiny.llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    method = prepared(PTuning(virtual_tokens=3, init_std=1.0), model)
    seen = {}
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(
            x=kwargs["hidden_states"], turn=kwargs["position_embeddings"]
        ),
        with_kwargs=True,
    )
    attention.register_forward_hook(lambda _, args, out: seen.update(y=out[0]))
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        method.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        x, (cos, sin) = seen["x"][0], seen["turn"]
        q, k = (_turned(w(x), cos[0], sin[0]) for w in (attention.q_proj, attention.k_proj))
        # Positions of the text begin behind the prefix, whose keys are not turned.
        angles = torch.arange(3, 7)[:, None] * model.model.rotary_emb.inv_freq
        torch.testing.assert_close(cos[0], torch.cat([angles, angles], -1).cos())
        prefix_k, prefix_v = prompt_of(method).view(3, 2, 32).unbind(1)
        keys = torch.cat([prefix_k, k])
        values = torch.cat([prefix_v, attention.v_proj(x)])
        hidden = torch.ones(4, 7).triu(4).bool()
        scores = (q @ keys.T / 32**0.5).masked_fill(hidden, -torch.inf)
        expected = attention.o_proj(scores.softmax(-1) @ values)
    torch.testing.assert_close(seen["y"][0], expected)


def _turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_the_loss_at_supervised_positions_is_the_models_own(build):
    """That loss asks for no cache, and the prefix is handed over as one."""
    method = prepared(PTuning(virtual_tokens=6, init_std=1.0), build())
    batch = tiny.batch_for(method.model)
    expected = method.model(**batch).loss
    expected.backward()
    gradient = prompt_of(method).grad.clone()
    prompt_of(method).grad = None
    found = SupervisedLoss(method.model)(batch)
    (found.total / found.num_targets).backward()
    torch.testing.assert_close(found.total / found.num_targets, expected)
    torch.testing.assert_close(prompt_of(method).grad, gradient)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("is_padded", [True, False])
def test_short_attention_in_bfloat16_sees_the_prefix(is_padded):
    found = []
    for is_short in (False, True):
        model = tiny.llama().bfloat16()
        method = prepared(PTuning(virtual_tokens=6, init_std=1.0), model)
        batch = tiny.batch_for(model)
        if not is_padded:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        assert use_short_attention(model) if is_short else True
        got, _ = supervised_logits(method.model, batch)
        got.float().square().mean().backward()
        found.append((got, prompt_of(method).grad))
        prompt_of(method).data.zero_()
        assert not torch.allclose(supervised_logits(method.model, batch)[0], got, atol=0.05)
    for plain, short in zip(*found, strict=True):
        error = (plain - short).float().norm() / plain.float().norm()
        assert error < 0.02


def test_gradient_checkpointing_is_refused():
    method = prepared(PTuning(virtual_tokens=6), tiny.llama())
    tiny.checkpointing(method.model)
    with pytest.raises(ValueError, match="`gradient_checkpointing` takes away the keys and values"):
        Drive(method).begin()


def test_a_span_predictor_is_adapted(tmp_path):
    options = dict(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=tiny.PADDING,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.15,
    )  # fmt: skip

    def build():
        with tiny.seeded(0):
            return RobertaForQuestionAnswering(RobertaConfig(**options))

    method = PTuning(virtual_tokens=6, init_std=1.0)
    method.prepare(build(), task_type=TaskType.QUESTION_ANS, heads=["qa_outputs"])
    batch = tiny.causal_batch()
    batch.pop("labels")
    places = dict(start_positions=torch.arange(6) % 5, end_positions=torch.arange(6) % 6)
    optimizer = tiny.optimizer_for(method.model)
    losses = []
    for _ in range(20):
        loss = method.model(**batch, **places).loss
        loss.backward()
        optimizer.step()
        assert prompt_of(method).grad.abs().max() > 0
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    method.save(tmp_path)
    opened = PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        expected = method.model.eval()(**batch).start_logits
        torch.testing.assert_close(opened(**batch).start_logits, expected)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.roberta_classifier])
def test_what_is_saved_opens_in_peft_alone(build, tmp_path):
    method = prepared(PTuning(virtual_tokens=6, init_std=1.0), build())
    Drive(method).begin().train(until=4)
    method.save(tmp_path)
    batch = tiny.batch_for(method.model)
    expected = logits(method, batch)
    method.model = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(method, batch), expected)


@pytest.mark.parametrize(
    ("build", "positions"),
    [(tiny.gpt2, 64), (tiny.bert_classifier, 64), (tiny.roberta_classifier, 63)],
)
def test_a_text_without_positions_left_is_refused(build, positions):
    method = prepared(PTuning(virtual_tokens=20), build())
    longest = torch.full((1, positions - 20), 7)
    method.watch({"input_ids": longest})
    method.model(input_ids=longest)
    with pytest.raises(ValueError, match=f"has {positions} positions, of which 20 are taken"):
        method.watch({"input_ids": torch.full((1, positions - 19), 7)})


def test_llama_has_positions_without_end():
    method = prepared(PTuning(virtual_tokens=20), tiny.llama())
    method.watch({"input_ids": torch.full((1, 100), 7)})


def test_another_number_of_tokens_is_not_gone_on_with(tmp_path):
    prepared(PTuning(virtual_tokens=6), tiny.llama()).save(tmp_path)
    method = prepared(PTuning(virtual_tokens=7), tiny.llama())
    before = prompt_of(method).clone()
    with pytest.raises(ValueError, match="begun with `virtual_tokens` of 6, and now it is 7"):
        method.check_saved(tmp_path)
    assert torch.equal(prompt_of(method), before)
