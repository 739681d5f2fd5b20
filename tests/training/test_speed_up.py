"""The fast step in everybody's own Trainer."""

import copy

import pytest
import tiny
import torch
import trainers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn

from loralloc import speed_up, use_supervised_loss
from loralloc.kernels import attention, lora

TRAINERS = (trainers.causal_trainer, trainers.classification_trainer)


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that ran."""
    seen = set()
    for module, name in ((lora, "_lora_linears"), (attention, "short_attention")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, own=own, name=name: seen.add(name) or own(*args)
        )
    return seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("build", TRAINERS)
def test_a_run_has_the_losses_and_the_adapter_of_stock_peft(build, when, tmp_path, calls):
    stock = build(tmp_path)
    stock.train()
    assert not calls
    if when == "before":
        model = build(tmp_path).model
        speed_up(model)
        fast = build(tmp_path, model=model)
    else:
        fast = build(tmp_path)
        speed_up(fast.model)
    fast.train()
    assert calls == {"_lora_linears"}
    assert trainers.losses(fast) == pytest.approx(trainers.losses(stock), rel=1e-4)
    expected, got = (trainers.adapter(trainer.model) for trainer in (stock, fast))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("supervised", [False, True])
def test_a_run_under_autocast_has_the_losses_of_stock_peft_to_rounding(supervised, tmp_path, calls):
    stock, fast = (trainers.causal_trainer(tmp_path, bf16=True) for _ in range(2))
    speed_up(fast.model)
    if supervised:
        use_supervised_loss(fast)
    fast.train()
    assert calls == {"_lora_linears", "short_attention"}
    stock.train()
    assert trainers.losses(fast) == pytest.approx(trainers.losses(stock), rel=0.01)
    assert {p.dtype for p in fast.model.parameters()} == {torch.float32}


def test_what_was_found_is_told_and_told_again():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "embed_tokens"])
    assert speed_up(model) == speed_up(model) == (2, 1, True)
    assert str(speed_up(model)) == "SpedUp(num_layers=2, num_others=1, short_attention=True)"


def test_a_model_that_is_not_of_transformers_has_its_linears():
    with tiny.seeded(0):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    tiny.with_trained_b(model)
    fast, x = copy.deepcopy(model), torch.linspace(-1, 1, 12).view(2, 6)
    assert speed_up(fast) == (2, 0, False)
    torch.testing.assert_close(fast(x), model(x))


def test_what_is_saved_opens_in_stock_peft(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    speed_up(model)
    model.save_pretrained(tmp_path / "adapter")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    batch = tiny.causal_batch()
    torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)


def test_a_model_without_lora_is_refused():
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has no LoRA layer, .* wrap it with"):
        speed_up(tiny.llama())


@pytest.mark.parametrize("options", [dict(lora_dropout=0.1), dict(use_dora=True)], ids=str)
def test_a_model_that_nothing_could_speed_up_is_refused(options):
    model = tiny.adapted(tiny.llama(), **options)
    with pytest.raises(TypeError, match=r"None of the model's 14 LoRA layers .* `lora_dropout` to"):
        speed_up(model)
    assert model.config._attn_implementation == "sdpa"


def test_trls_trainer_with_its_defaults_has_the_losses_of_stock_peft_to_rounding(
    llama_folder, tmp_path, calls
):
    """Autocast and gradient checkpointing."""
    defaults = dict(bf16=True, gradient_checkpointing=True, num_train_epochs=1)
    stock, fast = (
        trainers.sft_trainer(tmp_path, model_folder=llama_folder, **defaults) for _ in range(2)
    )
    speed_up(fast.model)
    fast.train()
    assert calls == {"_lora_linears", "short_attention"}
    stock.train()
    assert trainers.losses(fast) == pytest.approx(trainers.losses(stock), rel=0.01)
