"""Rounds beside whatever else PEFT lets train, and beside other adapters."""

from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from trainers import (
    causal_trainer,
    killed_and_resumed,
    options,
    present,
    ranks_now,
    without_seconds,
)

from loralloc import attach

# PEFT saves the head beside its ranks, for whoever has changed its size.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

BATCH = tiny.causal_batch(seed=3)
HEAD = [*tiny.LLAMA_TARGETS, "lm_head"]


def untied():
    return tiny.llama(tie_word_embeddings=False)


def tied():
    return tiny.llama(tie_word_embeddings=True)


CASES = {
    "a head in full": (untied, dict(modules_to_save=["lm_head"])),
    "embeddings and head in full": (untied, dict(modules_to_save=["embed_tokens", "lm_head"])),
    "tied embeddings in full": (
        tied,
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "tokens": (untied, dict(trainable_token_indices={"embed_tokens": [5, 9, 11]})),
    "tokens of tied embeddings": (tied, dict(trainable_token_indices=[5, 9, 11])),
    "ranks of the head": (untied, dict(target_modules=HEAD)),
    "tied embeddings": (tied, {}),
    "rsLoRA": (untied, dict(use_rslora=True)),
    "biases": (tiny.gpt2, dict(bias="all")),
}


def others(model):
    """What trains besides ranks."""
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad and "lora_" not in name
    }


@torch.no_grad()
def logits(model):
    return model.eval()(**BATCH).logits


IN_EVERY_RUN = list(CASES)[::4]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in IN_EVERY_RUN else [pytest.mark.slow]) for c in CASES],
)
def test_ranks_move_and_what_is_saved_is_whole(case, tmp_path):
    build, lora = CASES[case]

    def trainer(name, **changes):
        model = tiny.adapted(build(), r=2, **lora)
        return causal_trainer(tmp_path / name, model=model, **changes)

    whole = trainer("whole")
    before = others(whole.model)
    allocation = attach(whole, options())
    whole.train()
    assert len({rank for rank in ranks_now(whole.model).values()}) > 1
    after = others(whole.model)  # an emptied module's bias has another name
    assert all(not torch.equal(after[name], before[name]) for name in after.keys() & before.keys())
    if case == "ranks of the head":
        assert any("lm_head" in entry.ranks_before for entry in allocation.record.rounds)

    whole.save_model(str(tmp_path / "saved"))
    stock = PeftModel.from_pretrained(build(), tmp_path / "saved")
    assert ranks_now(stock) == present(allocation.record.ranks)
    torch.testing.assert_close(logits(stock), logits(whole.model), rtol=0, atol=1e-6)

    resumed, again = killed_and_resumed(partial(trainer, "killed"), save_steps=4)
    assert without_seconds(again.record.rounds) == without_seconds(allocation.record.rounds)
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=0)


def test_another_adapter_stays_as_it_was(tmp_path):
    model = tiny.adapted(tiny.llama(), r=2)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("default")

    def of_second():
        return {n: v.clone() for n, v in model.state_dict().items() if "second" in n}

    def through_second():
        model.set_adapter("second")
        found = logits(model)
        model.set_adapter("default")
        return found

    before, seen = of_second(), through_second()
    trainer = causal_trainer(tmp_path, model=model)
    allocation = attach(trainer, options())
    trainer.train()
    assert len(allocation.record.rounds) == 3
    after = of_second()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(through_second(), seen, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "saved")
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    stock.load_adapter(tmp_path / "saved" / "second", "second")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)
    stock.set_adapter("second")
    torch.testing.assert_close(logits(stock), seen, rtol=0, atol=1e-6)
