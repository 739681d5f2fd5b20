"""Our trainer's loss against TRL's own, and what TRL does to the data."""

import json

import mixtures
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from waits import waits_of

from loralloc.runs.data import ROW
from loralloc.runs.heads import lm
from loralloc.tasks.source import Split


@pytest.fixture
def trainer_on(tmp_path, llama_folder):
    """Our trainer on given rows, with a trained adapter."""

    def build(
        rows, validation=None, *, folder=llama_folder, target_modules="all-linear", **changes
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        usual = dict(
            output_dir=str(tmp_path),
            report_to="none",
            bf16=False,
            use_cpu=True,
            per_device_train_batch_size=4,
            max_length=64,
            gradient_checkpointing=False,
        )
        splits = {
            name: Split(name=name, dataset=numbered(part), source=f"{name}.jsonl")
            for name, part in (("train", rows), ("validation", validation or rows))
        }
        tokenizer = AutoTokenizer.from_pretrained(llama_folder)
        return lm.sft_trainer(model, tokenizer, SFTConfig(**{**usual, **changes}), splits)

    return build


def numbered(rows):
    return Dataset.from_list([{**row, ROW: number} for number, row in enumerate(rows, start=1)])


def rows(count=8):
    return [
        {"prompt": f"the film {number} is" + " very" * number, "completion": " good and warm"}
        for number in range(count)
    ]


TEXTS = [{"text": "the film is good" + " and warm" * number} for number in range(8)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"is film {number} good"},
            {"role": "assistant", "content": "it is good" + " and warm" * number},
        ]
    }
    for number in range(8)
]


def loss_and_gradients(trainer, batch, compute_loss, num_items):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return loss.detach(), gradients


@pytest.mark.parametrize("data", (rows(), TEXTS, MESSAGES), ids=("prompts", "texts", "messages"))
@pytest.mark.parametrize("num_items", (None, 50), ids=("alone", "accumulated"))
def test_loss_and_gradients_are_trls(data, num_items, trainer_on):
    trainer = trainer_on(data)
    batch = next(iter(trainer.get_train_dataloader()))
    num_items = None if num_items is None else torch.tensor(num_items)
    ours = loss_and_gradients(trainer, batch, lm.SupervisedSFTTrainer.compute_loss, num_items)
    theirs = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, num_items)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(bool(gradient.any()) for gradient in ours[1].values())


def test_under_autocast_losses_are_trls_to_rounding(trainer_on):
    losses = []
    for own in (True, False):
        trainer = trainer_on(rows(), bf16=True, max_steps=3, logging_steps=1, learning_rate=1e-2)
        if not own:
            trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert trainer._supervised_loss._passes_on is (True if own else None)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("num_items", (None, 50), ids=("alone", "accumulated"))
def test_with_several_processes_gradients_are_trls(num_items, average, trainer_on, monkeypatch):
    trainer = trainer_on(rows(), average_tokens_across_devices=average)
    batch = next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 4)
    num_items = None if num_items is None else torch.tensor(num_items)
    ours = loss_and_gradients(trainer, batch, lm.SupervisedSFTTrainer.compute_loss, num_items)
    theirs = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, num_items)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_several_processes_take_one_way_whatever_their_batches(trainer_on, monkeypatch):
    trainer = trainer_on(rows())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 4)
    batch = next(iter(trainer.get_train_dataloader()))
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    monkeypatch.setattr(SFTTrainer, "compute_loss", None)  # where others would wait for this one
    assert trainer.compute_loss(trainer.model, nothing).detach() == 0


def test_a_step_waits_for_the_device_once_and_what_is_logged_are_numbers(trainer_on):
    trainer = trainer_on(rows(), max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own = waits_of(lambda: trainer.model(**inputs).logits.sum().backward())
    trainer.compute_loss(trainer.model, batch)
    waits = waits_of(trainer.compute_loss, trainer.model, batch)
    assert len(waits) == len(own) + 1
    trainer.train()
    train, evaluation, _ = trainer.state.log_history
    for name in ("mean_token_accuracy", "num_tokens"):
        assert type(train[name]) is type(evaluation[f"eval_{name}"]) is float
    json.dumps(trainer.state.log_history)


def test_a_mixture_has_the_loss_of_its_router(trainer_on, tmp_path):
    vocabulary = trainer_on(rows()).model.config.vocab_size
    model = mixtures.mixtral(vocab_size=vocabulary, output_router_logits=False)
    model.save_pretrained(tmp_path / "mixtral")
    targets = ["q_proj", "v_proj"]
    trainer = trainer_on(rows(), folder=tmp_path / "mixtral", target_modules=targets)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = loss_and_gradients(trainer, batch, lm.SupervisedSFTTrainer.compute_loss, None)
    theirs = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, None)
    torch.testing.assert_close(ours, theirs)
    config = trainer.model.get_base_model().config  # which TRL before 1.16 reads
    trainer.aux_loss_enabled = config.output_router_logits = False
    without, _ = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, None)
    assert ours[0] - without > 0.1


def test_a_compiled_model_has_trls_loss(trainer_on, monkeypatch):
    trainer = trainer_on(rows())
    trainer.model.compile(backend="eager")
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *_: "TRL's")
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model, batch) == "TRL's"


# TRL warns of sequences that see each other, which they do not: their positions begin anew.
@pytest.mark.filterwarnings("ignore:.*attention implementation:UserWarning")
@pytest.mark.parametrize(
    "changes",
    ({}, dict(padding_free=True, max_length=None), dict(packing=True)),
    ids=("padded", "padding-free", "packed"),
)
def test_token_accuracy_and_count_are_trls(changes, trainer_on):
    trainer = trainer_on(rows(), **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    _make_every_other_prediction_right(trainer.model, batch)
    seen = []
    for compute_loss in (lm.SupervisedSFTTrainer.compute_loss, SFTTrainer.compute_loss):
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        loss_and_gradients(trainer, batch, compute_loss, None)
        metrics = trainer._metrics["train"]
        seen.append((metrics["mean_token_accuracy"], metrics["num_tokens"]))
    assert seen[0] == seen[1]
    assert 0 < seen[0][0][0] < 1


def _make_every_other_prediction_right(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(dim=-1)[:, :-1]
    targets = batch["labels"][:, 1:]
    right = targets != -100
    right[:, ::2] = False
    targets[right] = predicted[right]


def test_where_the_logits_do_not_fit_trls_own_way_is_taken(trainer_on, monkeypatch):
    trainer = trainer_on(rows())
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch))
    monkeypatch.setattr(lm, "MOST_LOGITS", 1)
    trainer._supervised_loss._passes_on = False  # a head that is not computed in chunks
    monkeypatch.setattr(lm.SupervisedLoss, "__call__", None)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("changes", (dict(loss_type="dft"), dict(label_smoothing_factor=0.1)))
def test_other_losses_are_trls(changes, trainer_on):
    trainer = trainer_on(rows(), **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = loss_and_gradients(trainer, batch, lm.SupervisedSFTTrainer.compute_loss, None)
    theirs = loss_and_gradients(trainer, batch, SFTTrainer.compute_loss, None)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("data", [rows(), TEXTS], ids=["completions", "texts"])
def test_without_padding_loss_and_gradients_are_the_same(data, trainer_on):
    results = []
    for padding_free in (False, True):
        trainer = trainer_on(data, padding_free=padding_free, max_length=None)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 7, 3)])
        assert (batch["input_ids"].shape[0] == 1) == padding_free
        compute_loss = lm.SupervisedSFTTrainer.compute_loss
        results.append(loss_and_gradients(trainer, batch, compute_loss, None))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_evaluation_gives_trls_loss(trainer_on):
    trainer = trainer_on(rows())
    ours = trainer.evaluate()["eval_loss"]
    trainer.compute_loss = SFTTrainer.compute_loss.__get__(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ours, rel=1e-5)


def test_of_prompt_and_completion_only_the_completion_is_supervised(trainer_on):
    trainer = trainer_on(rows())
    tokenizer = trainer.processing_class
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert supervised == " good and warm</s>"


def test_of_plain_text_every_token_is_supervised(trainer_on):
    batch = next(iter(trainer_on(TEXTS).get_train_dataloader()))
    assert bool(((batch["labels"] != -100) == batch["attention_mask"].bool()).all())


def test_packed_rows_are_cut_and_joined(trainer_on):
    trainer = trainer_on(TEXTS * 4, packing=True, packing_strategy="wrapped", max_length=16)
    assert {len(row) for row in trainer.train_dataset["input_ids"][:-1]} == {16}


@pytest.mark.parametrize("split", ("train", "validation"))
def test_prompts_that_leave_no_supervised_token_are_counted_and_the_first_named(split, trainer_on):
    short, long = {"prompt": "a", "completion": " b"}, {"prompt": "film " * 30, "completion": " b"}
    broken = [short, short, long, short, long]
    data = {"rows": broken} if split == "train" else {"rows": [short] * 5, "validation": broken}
    with pytest.raises(ValueError) as error:
        trainer_on(**data, max_length=8)
    sentence = str(error.value)
    assert f"2 of 5 examples of {split}.jsonl have no supervised token left" in sentence
    assert "within `max_length` of 8, the first in row 3" in sentence
    assert "film film" in sentence
