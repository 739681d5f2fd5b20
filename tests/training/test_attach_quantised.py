"""Rounds on a backbone of a user's own that bitsandbytes has quantised."""

from functools import partial

import kbit
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from trainers import (
    adapter,
    arguments,
    causal_trainer,
    killed_and_resumed,
    options,
    present,
    ranks_now,
    without_seconds,
)
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from loralloc import attach
from loralloc.allocation.layers import lora_layers, weight_a
from loralloc.allocation.resize import resize
from loralloc.kernels.quantised import keep_unpacked

# PEFT calls it by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

BATCH = tiny.causal_batch()
FIRST = pytest.param("4bit", id="4bit")
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("double", "8bit")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kbit.save_wide(tmp_path_factory.mktemp("wide-llama"))


def prepared(folder, kind, **lora):
    """As PEFT's guide prepares a model: norms and head in float32, checkpointing, an adapter."""
    model = prepare_model_for_kbit_training(
        kbit.llama(folder, kind, torch.bfloat16),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return tiny.adapted(model, r=2, **lora)


@torch.no_grad()
def logits(model):
    keep_unpacked(model)
    return model.eval()(**BATCH).logits


@pytest.mark.parametrize("kind", [FIRST, *OTHERS])
def test_ranks_move_are_saved_and_resumed(kind, folder, tmp_path):
    def trainer(name, **changes):
        model = prepared(folder, kind, lora_dropout=0.2)
        return causal_trainer(
            tmp_path / name, model=model, bf16=True, eval_strategy="epoch", **changes
        )

    whole = trainer("whole")
    allocation = attach(whole, options())
    whole.train()
    assert len(allocation.record.rounds) == 3
    assert any(entry.added for entry in allocation.record.rounds)
    assert sum(ranks_now(whole.model).values()) == 2 * 14
    assert {w.dtype for w in adapter(whole.model).values()} == {torch.float32}
    whole.model.save_pretrained(tmp_path / "saved")
    stock = PeftModel.from_pretrained(kbit.llama(folder, kind, torch.bfloat16), tmp_path / "saved")
    keep_unpacked(stock)
    assert present(ranks_now(stock)) == present(ranks_now(whole.model))
    for name, value in adapter(stock).items():
        assert torch.equal(value, adapter(whole.model)[name])

    resumed, again = killed_and_resumed(partial(trainer, "killed"), save_steps=5)
    assert without_seconds(again.record.rounds) == without_seconds(allocation.record.rounds)
    assert adapter(resumed.model).keys() == adapter(whole.model).keys()
    for name, value in adapter(resumed.model).items():
        assert torch.equal(value, adapter(whole.model)[name])


@pytest.mark.parametrize("score", ["sensitivity", pytest.param("shapley", marks=pytest.mark.slow)])
def test_other_scores(score, folder, tmp_path):
    trainer = causal_trainer(tmp_path, model=prepared(folder, "4bit"), bf16=True)
    given = {} if score == "shapley" else {"scoring_examples": 32}
    allocation = attach(trainer, options(score=score, num_rounds=1, **given))
    trainer.train()
    assert len(allocation.record.rounds) == 1


@pytest.mark.parametrize("kind", [FIRST, *OTHERS])
def test_ablation_is_refused_where_products_are_rounded(kind, folder, tmp_path):
    trainer = causal_trainer(tmp_path, model=prepared(folder, kind), bf16=True)
    with pytest.raises(ValueError, match=r"`score` is 'ablation', but the model computes in b?flo"):
        attach(trainer, options(score="ablation"))


def test_screened_is_gradient_where_products_are_rounded_and_exact_in_float32(folder, tmp_path):
    for dtype, is_exact in ((torch.bfloat16, False), (torch.float32, True)):
        model = tiny.adapted(kbit.llama(folder, "4bit", dtype), r=2)
        trainer = causal_trainer(tmp_path, model=model)
        allocation = attach(trainer, options(score="screened", verify_ranks=1000, num_rounds=1))
        trainer.train()
        (entry,) = allocation.record.rounds
        assert bool(entry.verified) is is_exact


@pytest.mark.parametrize("kind", [FIRST, *OTHERS])
def test_resized_layers_open_in_stock_peft_and_an_emptied_one_is_the_quantised_layer(
    kind, folder, tmp_path
):
    model = tiny.with_trained_b(prepared(folder, kind, use_rslora=True))
    first, second = list(lora_layers(model))[:2]
    base = lora_layers(model)[first].get_base_layer()
    resize(model, {first: 0, second: 5})
    assert model.get_base_model().get_submodule(first) is base
    tiny.with_trained_b(model, seed=4)
    model.save_pretrained(tmp_path)
    fresh = prepare_model_for_kbit_training(kbit.llama(folder, kind, torch.bfloat16))
    stock = PeftModel.from_pretrained(fresh, tmp_path)
    assert ranks_now(stock) == ranks_now(model)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=0)


class AfterTheRound(TrainerCallback):
    """A as the round leaves it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, *, model, **_):
        if state.global_step == self.step:
            layers = lora_layers(model).items()
            self.weights = {name: weight_a(layer).detach().clone() for name, layer in layers}


def test_ranks_of_a_late_round_turn_although_trl_casts_them_to_bfloat16(llama_folder, tmp_path):
    """With 8 bits, an update below half a unit in the last place of most of A is lost."""
    rows = {"prompt": ["the film is"] * 24, "completion": [" good", " bad"] * 12}
    trainer = SFTTrainer(
        kbit.llama(llama_folder, "4bit", torch.bfloat16),
        args=SFTConfig(
            **arguments(tmp_path, learning_rate=1e-4, bf16=True, gradient_checkpointing=False)
        ),
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(llama_folder),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
    )
    assert {w.dtype for w in adapter(trainer.model).values()} == {torch.bfloat16}
    allocation = attach(trainer, options())
    after = AfterTheRound(step=9)
    trainer.add_callback(after)
    trainer.train()
    last = allocation.record.rounds[-1]
    assert last.step == after.step and last.added
    for name, count in last.added.items():
        new = weight_a(lora_layers(trainer.model)[name])[-count:]
        moved = (new != after.weights[name][-count:]).float().mean()
        assert moved > 0.9, f"{moved:.0%} of the new rows of {name} have moved"
