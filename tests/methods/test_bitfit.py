import backbones
import pytest
import tiny
import torch
from session import Drive, logits, prepared
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from loralloc.methods.bitfit import BitFit


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Llama has none, so its 7 linear layers are given some: 4 d + 2 f + d.
        ("llama-2-7b", 32 * (5 * 4096 + 2 * 11008)),
        # q, k, v, o and both layers of the feed-forward; two layer norms, and one outside.
        ("roberta-large", 24 * (5 * 1024 + 4096 + 2 * 1024) + 1024),
        ("gpt2-large", 36 * (3 * 1280 + 1280 + 5120 + 1280 + 2 * 1280) + 1280),
    ],
)
def test_parameters_of_the_papers_backbones(name, parameters):
    model = backbones.build(name)
    assert BitFit().count(model, 0) == parameters
    assert prepared(BitFit(), model).num_trained() == parameters


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.bert_classifier, tiny.roberta_classifier])
def test_the_biases_of_the_backbone_train_and_no_others(build):
    model = build()
    inside = {
        name.removesuffix(".bias")
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and "classifier" not in name
    }
    trains = prepared(BitFit(), model).adapter_parameters()
    assert {name.removesuffix(".bias_shift") for name in trains} == inside


def test_a_budget_changes_nothing():
    for budget in (10, 10_000_000):
        method = BitFit()
        method.fit(tiny.gpt2(), budget)
        assert method == BitFit()


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.roberta_classifier])
def test_it_computes_what_the_backbone_with_those_biases_computes(build):
    method = prepared(BitFit(), build())
    Drive(method).begin().train(until=5)
    other, shifts = build(), method.adapter_parameters()
    if hasattr(other, "classifier"):
        other.classifier.load_state_dict(method.model.classifier.state_dict())
    assert all(shift.all() for shift in shifts.values())
    for name, shift in shifts.items():
        other.get_parameter(name.replace("bias_shift", "bias")).data.add_(shift)
    batch = tiny.batch_for(other)
    with torch.no_grad():
        expected = other(**batch).logits
    if expected.ndim == 3:
        expected = expected[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits(method, batch), expected)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.roberta_classifier])
def test_merged_it_is_opened_by_transformers_alone(build, tmp_path):
    method = prepared(BitFit(), build())
    Drive(method).begin().train(until=5)
    batch = tiny.batch_for(method.model)
    expected = logits(method, batch)
    method.merge().save_pretrained(tmp_path)
    method.model = type(method.model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(method, batch), expected)
    assert not [name for name, _ in method.model.named_parameters() if "shift" in name]


def test_a_backbone_that_cannot_be_saved_with_biases_is_not_merged():
    config = MistralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    method = prepared(BitFit(), MistralForCausalLM(config))
    with pytest.raises(ValueError, match="MistralForCausalLM has no biases and its configuration"):
        method.merge()


def test_in_bfloat16_the_shifts_train_in_float32():
    method = prepared(BitFit(), tiny.llama().bfloat16())
    losses = Drive(method).begin().train()
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(method.model, LlamaForCausalLM)
    assert {p.dtype for p in method.adapter_parameters().values()} == {torch.float32}
    assert method.model.lm_head.weight.dtype == torch.bfloat16
