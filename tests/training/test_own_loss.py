"""Importance is measured by what the trainer minimises, or the trainer is refused by name."""

import functools
import re

import pytest
import tiny
import torch
from crossed import crossed
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from trainers import (
    arguments,
    causal_rows,
    causal_trainer,
    classification_trainer,
    options,
    sft_trainer,
)
from transformers import (
    AutoTokenizer,
    BertModel,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from loralloc import attach
from loralloc.allocation.importance import ablation
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.policy import Limits
from loralloc.training.batches import draw
from loralloc.training.loss import objective, own_loss, use_supervised_loss

TARGETS = ["q_proj", "v_proj", "up_proj"]

# TRL calls them by their old names, around the pass without the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_(dis|en)able`:FutureWarning"
)


def preferences(count):
    return Dataset.from_dict(
        {
            "prompt": [f"the film {number} is" for number in range(count)],
            "chosen": [" good and warm"] * count,
            "rejected": [" bad"] * count,
        }
    )


def preference_trainer(kind, folder, llama_folder, **changes):
    """TRL's, which makes the adapter itself; with its defaults but for float32."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    size = dict(vocab_size=len(tokenizer), max_position_embeddings=128)
    if kind == "dpo":
        trainer_class, config, model = DPOTrainer, DPOConfig, tiny.llama(**size)
    else:
        config = tiny.llama(**size, num_labels=1).config
        with tiny.seeded(0):
            model = LlamaForSequenceClassification(config)
        trainer_class, config = RewardTrainer, RewardConfig
    return trainer_class(
        model,
        args=config(**arguments(folder, bf16=False, max_length=64, **changes)),
        train_dataset=preferences(24),
        eval_dataset=preferences(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS),
    )


def loss_of(trainer, batch):
    """Through the trainer's own evaluation of a batch."""
    with torch.no_grad():
        return float(trainer.prediction_step(trainer.model.eval(), dict(batch), True)[0])


@pytest.mark.parametrize(
    ("kind", "score"), crossed(["dpo", "reward"], ["gradient", "ablation", "architecture"])
)
def test_rounds_take_place_in_preference_trainers(kind, score, tmp_path, llama_folder):
    trainer = preference_trainer(kind, tmp_path, llama_folder)
    allocation = attach(trainer, options(score=score))
    trainer.train()
    assert len(allocation.record.rounds) == 3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    keys = {"reward": "accuracy", "dpo": "rewards/accuracies"}
    assert all(keys[kind] in entry for entry in logged)
    assert not any(trainer._metrics["eval"].values())


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_scores_are_of_the_preferences(kind, tmp_path, llama_folder):
    trainer = preference_trainer(kind, tmp_path, llama_folder)
    trainer.train()
    (batch,) = draw(trainer, trainer.eval_dataset, num_examples=2, seed=0)
    layers = lora_layers(trainer.model)
    found = objective(trainer, [batch])
    scores = ablation.score(found, weights_b(layers), Limits(num_pruned=1))
    full = loss_of(trainer, batch)
    assert scores.s_full == pytest.approx(-full, abs=1e-6)
    name, b = next(iter(weights_b(layers).items()))
    with torch.no_grad():
        column, b[:, 0] = b[:, 0].clone(), 0
        without = loss_of(trainer, batch)
        b[:, 0] = column
        weights = {name: b.clone() for name, b in weights_b(layers).items()}
        for other in weights_b(layers).values():
            other.zero_()
        base = loss_of(trainer, batch)
        b[:, 0] = column
        only = loss_of(trainer, batch)
    assert abs(without - full) > 1e-4
    assert float(scores.terms["without"][name][0]) == pytest.approx(without - full, abs=1e-6)
    assert float(scores.terms["only"][name][0]) == pytest.approx(base - only, abs=1e-6)
    assert weights.keys() == layers.keys()


def test_what_is_logged_of_training_is_left_alone(tmp_path, llama_folder):
    trainer = preference_trainer("reward", tmp_path, llama_folder)
    trainer._metrics["eval"]["accuracy"].append(0.5)
    trainer._total_train_tokens = 7
    batch, *_ = draw(trainer, trainer.eval_dataset, num_examples=2, seed=0)
    for mode in (True, False):
        own_loss(trainer)(batch)
        trainer.model.train(mode)
    assert {mode: dict(kept) for mode, kept in trainer._metrics.items()} == {
        "train": {},
        "eval": {"accuracy": [0.5]},
    }
    assert trainer._total_train_tokens == 7


def test_a_trainer_that_generates_what_it_trains_on_is_refused_by_name(tmp_path, llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    rows = Dataset.from_dict({"prompt": ["the film is"] * 8})
    trainer = GRPOTrainer(
        tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=128),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(**arguments(tmp_path, bf16=False, num_generations=2)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=TARGETS),
    )
    words = 'The loss of a GRPOTrainer is on examples that it makes .*score="sensitivity"'
    with pytest.raises(TypeError, match=words):
        attach(trainer, options())


def test_gathered_scores_ask_for_no_loss_on_held_out_examples(tmp_path):
    class Online(Trainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(inputs)

    plain = causal_trainer(tmp_path)
    args = TrainingArguments(**arguments(tmp_path))
    trainer = Online(plain.model, args, train_dataset=plain.train_dataset)
    allocation = attach(trainer, options(score="sensitivity"))
    trainer.train()
    assert len(allocation.record.rounds) == 3


class Squared(Trainer):
    """A loss of the user's on a model that has none."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.mse_loss(outputs.last_hidden_state.mean((1, 2)), labels.float())
        return (loss, outputs) if return_outputs else loss


def squared_trainer(folder):
    model = BertModel(tiny.bert_classifier().config)
    options = dict(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model = get_peft_model(model, LoraConfig(r=2, **options))
    plain = classification_trainer(folder)
    args = TrainingArguments(**arguments(folder, remove_unused_columns=False))
    args.label_names = ["labels"]
    return Squared(model, args, train_dataset=plain.train_dataset, eval_dataset=plain.eval_dataset)


@pytest.mark.parametrize("score", ["gradient", "ablation", "architecture"])
def test_an_own_compute_loss(score, tmp_path):
    trainer = squared_trainer(tmp_path)
    allocation = attach(trainer, options(score=score))
    trainer.train()
    assert len(allocation.record.rounds) == 3


def test_an_own_compute_loss_is_what_is_measured(tmp_path):
    trainer = squared_trainer(tmp_path)
    batches = draw(trainer, trainer.eval_dataset, num_examples=8, seed=0)
    mean = sum(len(batch["labels"]) * loss_of(trainer, batch) for batch in batches) / 8
    found = objective(trainer, batches)
    with found.evaluating():
        assert found.mean_loss() == pytest.approx(mean)


@pytest.mark.parametrize(
    "changes",
    [
        dict(label_smoothing_factor=0.2),
        dict(compute_loss_func=lambda outputs, labels, **_: outputs.logits.mean()),
    ],
    ids=["label smoothing", "compute_loss_func"],
)
def test_a_trainers_other_losses(changes, tmp_path):
    function = changes.pop("compute_loss_func", None)
    trainer = classification_trainer(tmp_path, **changes)
    trainer.compute_loss_func = function
    (batch,) = draw(trainer, trainer.eval_dataset, num_examples=2, seed=0)
    found = objective(trainer, [batch])
    with found.evaluating():
        assert found.mean_loss() == pytest.approx(loss_of(trainer, batch))
        assert found.mean_loss() != pytest.approx(float(trainer.model(**batch).loss.detach()))


def test_losses_that_are_known_stay_losses_of_each_target(tmp_path, llama_folder):
    supervised = causal_trainer(tmp_path)
    use_supervised_loss(supervised)
    sft = sft_trainer(tmp_path, model_folder=llama_folder)
    for trainer in (causal_trainer(tmp_path), classification_trainer(tmp_path), supervised, sft):
        assert own_loss(trainer) is None


def test_a_loss_that_only_looks_like_a_known_one(tmp_path, llama_folder):
    wrapped = causal_trainer(tmp_path)
    usual = wrapped.compute_loss

    @functools.wraps(usual)
    def doubled(*args, **kwargs):
        return 2 * usual(*args, **kwargs)

    wrapped.compute_loss = doubled
    other = sft_trainer(tmp_path, model_folder=llama_folder, loss_type="dft")
    for trainer in (wrapped, other):
        assert own_loss(trainer) is not None


def test_a_loss_that_draws_draws_the_same_for_every_pass(tmp_path):
    class Noisy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return model(**inputs).loss + torch.randn(())

    plain = causal_trainer(tmp_path)
    trainer = Noisy(plain.model, TrainingArguments(**arguments(tmp_path)))
    loss, batch = own_loss(trainer), plain.data_collator([causal_rows(1)[0]])
    trainer.model.eval()
    before = torch.get_rng_state()
    assert float(loss(batch).detach()) == float(loss(batch).detach())
    assert torch.equal(torch.get_rng_state(), before)
    trainer.model.train()
    assert float(loss(batch).detach()) != float(loss(batch).detach())


def test_a_loss_that_cannot_be_computed_is_told_at_the_start(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return inputs["teacher"]

    plain = causal_trainer(tmp_path)
    data = dict(train_dataset=plain.train_dataset, eval_dataset=causal_rows(8))
    trainer = Broken(plain.model, TrainingArguments(**arguments(tmp_path)), **data)
    words = "The loss of this Broken could not be computed on held-out examples (KeyError: 'teacher"
    with pytest.raises(ValueError, match=re.escape(words)):
        attach(trainer, options())


def test_a_plain_module_in_a_trainer(tmp_path):
    class Perceptron(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x, labels=None):
            for block in self.blocks:
                x = block(x).relu()
            logits = self.head(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    with tiny.seeded(0):
        rows = [{"x": torch.randn(8), "labels": number % 3} for number in range(24)]
        model = get_peft_model(
            Perceptron(), LoraConfig(r=2, target_modules=["blocks.0", "blocks.1"])
        )
    args = TrainingArguments(**arguments(tmp_path, remove_unused_columns=False))
    for score in ("ablation", "gradient"):
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:8])
        allocation = attach(trainer, options(score=score, ranks_per_round=1, num_rounds=1))
        trainer.train()
        assert len(allocation.record.rounds) == 1
