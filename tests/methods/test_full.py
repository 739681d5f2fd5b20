import backbones
import pytest
import tiny
import torch
from safetensors.torch import load_file
from session import Drive, logits, prepared

from loralloc.methods.full import Full


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("gpt2-large", 774_030_080)],
)
def test_it_has_the_backbones_parameters(name, parameters):
    assert Full().count(backbones.build(name), 0) == parameters


def test_a_new_head_is_not_counted():
    model = tiny.roberta_classifier()
    assert Full().count(model, 0) == sum(p.numel() for p in model.roberta.parameters())
    assert prepared(Full(), model).num_trained() == Full().count(model, 0)


def test_a_budget_changes_nothing():
    method = Full()
    method.fit(tiny.gpt2(), 10)
    assert method == Full()


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.roberta_classifier])
def test_every_weight_trains(build):
    method, before = prepared(Full(), build()), build().state_dict()
    Drive(method).begin().train(until=3)
    now = method.model.state_dict()
    assert not [name for name in before if torch.equal(now[name], before[name])]


def test_a_backbone_in_bfloat16_is_trained_in_float32():
    method = prepared(Full(), tiny.llama().bfloat16())
    assert {p.dtype for p in method.model.parameters()} == {torch.float32}
    losses = Drive(method, lr=1e-3).begin().train()
    assert losses[-1] < 0.8 * losses[0]


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    method = prepared(Full(), tiny.llama(tie_word_embeddings=True))
    Drive(method).begin().train(until=3)
    method.save(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "adapter_model.safetensors")
    other = prepared(Full(), tiny.llama(tie_word_embeddings=True))
    other.load(tmp_path)
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
    batch = tiny.batch_for(other.model)
    assert torch.equal(logits(other, batch), logits(method, batch))


def test_merged_it_is_opened_by_transformers_alone(tmp_path):
    method = prepared(Full(), tiny.gpt2().bfloat16())
    Drive(method).begin().train(until=3)
    batch = tiny.batch_for(method.model)
    expected = logits(method, batch)
    method.merge().save_pretrained(tmp_path)
    method.model = type(method.model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(method, batch), expected)
