"""What is saved opens in stock PEFT, in a fresh model, and says the same."""

import pytest
import tiny
import torch
from peft import PeftModel

from loralloc.allocation.layers import lora_layers
from loralloc.allocation.resize import resize


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def assert_opens_equal(model, fresh, folder):
    batch = tiny.batch_for(model)
    before = logits(model, batch)
    model.save_pretrained(folder)
    opened = PeftModel.from_pretrained(fresh, folder).eval()
    torch.testing.assert_close(logits(opened, batch), before, rtol=0, atol=1e-5)
    assert {name: layer.r for name, layer in lora_layers(opened).items()} == {
        name: layer.r for name, layer in lora_layers(model).items()
    }
    for of_model in (opened, model):
        merged = of_model.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), before, rtol=0, atol=1e-5)


def unequal(model, *, empty=()):
    """Every module another rank, and some none."""
    ranks = {name: 1 + number % 6 for number, name in enumerate(lora_layers(model))}
    return ranks | {name: 0 for name in ranks if name.endswith(tuple(empty))}


@pytest.mark.parametrize("build", tiny.MODELS)
@pytest.mark.parametrize("options", [dict(), dict(use_rslora=True, lora_alpha=7)])
def test_unequal_ranks_and_emptied_modules(build, options, tmp_path):
    model = tiny.adapted(build(), **options)
    resize(model, unequal(model, empty=("0.attn.c_proj", "1.self_attn.v_proj", "1.output.dense")))
    tiny.with_trained_b(model)
    assert_opens_equal(model, build(), tmp_path)


def test_twelve_blocks_of_which_1_is_not_10_or_11(tmp_path):
    model = tiny.adapted(tiny.llama(num_hidden_layers=12), target_modules=["q_proj", "up_proj"])
    name = "model.layers.{}.self_attn.q_proj"
    resize(model, {name.format(1): 2, name.format(11): 7, name.format(0): 0, name.format(10): 3})
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.llama(num_hidden_layers=12), tmp_path)


def test_a_pattern_of_the_users_own(tmp_path):
    pattern = dict(rank_pattern={"q_proj": 2, "up_proj": 6}, alpha_pattern={"q_proj": 5})
    model = tiny.adapted(tiny.llama(), **pattern)
    resize(model, {"model.layers.1.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 0})
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.llama(), tmp_path)


@pytest.mark.parametrize("exclude", [r".*layers\.0\..*_proj", ["k_proj"]])
def test_modules_the_user_excluded_stay_excluded(exclude, tmp_path):
    model = tiny.adapted(tiny.llama(), exclude_modules=exclude)
    resize(model, {"model.layers.1.self_attn.q_proj": 0, "model.layers.1.mlp.up_proj": 0})
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.llama(), tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|up_proj)"])
def test_targets_given_as_a_string(targets, tmp_path):
    model = tiny.adapted(tiny.llama(), target_modules=targets)
    resize(model, unequal(model, empty=["0.self_attn.q_proj"]))
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.llama(), tmp_path)


def test_a_module_emptied_in_every_block(tmp_path):
    model = tiny.adapted(tiny.llama())
    resize(model, unequal(model, empty=["q_proj"]))
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.llama(), tmp_path)


@pytest.mark.parametrize("exclude", [None, r".*lm_head|nothing"])
def test_modules_emptied_one_after_the_other(exclude, tmp_path):
    model = tiny.adapted(tiny.gpt2(), exclude_modules=exclude)
    for name in list(lora_layers(model))[1:6]:
        resize(model, {name: 0})
    tiny.with_trained_b(model)
    assert_opens_equal(model, tiny.gpt2(), tmp_path)


def test_a_second_life_after_opening(tmp_path):
    model = tiny.adapted(tiny.llama())
    resize(model, unequal(model, empty=["0.mlp.up_proj"]))
    tiny.with_trained_b(model)
    model.save_pretrained(tmp_path / "first")
    opened = PeftModel.from_pretrained(tiny.llama(), tmp_path / "first", is_trainable=True).eval()
    resize(opened, {"model.layers.1.mlp.up_proj": 0, "model.layers.0.self_attn.q_proj": 9})
    tiny.with_trained_b(opened)
    assert_opens_equal(opened, tiny.llama(), tmp_path / "second")


@pytest.mark.parametrize(("bias", "empty"), [("all", ["0.mlp.c_fc"]), ("lora_only", [])])
def test_biases_that_train(bias, empty, tmp_path):
    model = tiny.adapted(tiny.gpt2(), bias=bias)
    tiny.train(model, tiny.batch_for(model), 2)
    resize(model, unequal(model, empty=empty))
    before = logits(model, tiny.batch_for(model))
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny.gpt2(), tmp_path).eval()
    torch.testing.assert_close(logits(opened, tiny.batch_for(model)), before, rtol=0, atol=1e-5)


def test_a_module_whose_bias_would_not_be_saved_is_not_emptied():
    model = tiny.adapted(tiny.gpt2(), bias="lora_only")
    before = list(model.parameters())
    with pytest.raises(ValueError) as error:
        resize(model, {"transformer.h.0.mlp.c_fc": 0})
    assert str(error.value) == (
        "transformer.h.0.mlp.c_fc would be left with rank 0, but the adapter has "
        "`bias='lora_only'`, with which PEFT saves a module's bias only beside its ranks; keep a "
        "rank of every module."
    )
    assert all(x is y for x, y in zip(model.parameters(), before, strict=True))
    resize(tiny.adapted(tiny.llama(), bias="lora_only"), {"model.layers.0.mlp.up_proj": 0})
