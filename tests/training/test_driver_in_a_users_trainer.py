"""What `drive` and `attach` do to a user's trainer and model, and how it is undone."""

import copy
import inspect

import given
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trainers import (
    Interrupted,
    KillAt,
    adapter,
    causal_trainer,
    classification_trainer,
    options,
    present,
    ranks_now,
)
from transformers import TrainerCallback

from loralloc import attach, detach, drive, get_method, open_adapter
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.record import Record
from loralloc.methods.catalog import METHODS
from loralloc.methods.restore import saved_ranks
from loralloc.runs.options import CHECKPOINTING


def own_attributes(trainer):
    return {name for name, value in vars(trainer).items() if callable(value)}


SHRINKING = AllocationConfig(rounds_at=(3, 5, 7), scoring_examples=4, judging_examples=4)

IN_EVERY_RUN = {
    *("lora", "alora", "shrink", "adalora", "sora", "salora", "ssp", "p-tuning-v2", "spt"),
    *("houlsby", "lst", "learned-adapter", "full"),
}
"""Methods that differ in how they drive a trainer; `make reliability` has the others too."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow])
        for name in METHODS
    ],
)
def test_every_method_drives_a_trainer_of_a_bare_backbone_in_one_line(name, tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.llama(), num_train_epochs=4)
    if get_method(name).allocates:
        allocation = SHRINKING if name == "shrink" else options(ranks_per_round=4)
        method = get_method(name)(allocation=allocation)
    else:
        method = get_method(name)(**given.options(name))
    drive(trainer, method)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    opened = open_adapter(tiny.llama(), tmp_path / "saved")
    batch = tiny.causal_batch(seed=9)
    expected, found = (logits(model, method, batch) for model in (method.model, opened))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model, method, batch):
    model.eval()
    for watched in (method, getattr(model, "loralloc_method", method)):
        watched.watch(batch)
    asked = {name: value for name, value in batch.items() if name != "labels"}
    return model(**asked).logits[batch["attention_mask"].bool()]


def test_a_classifiers_head_trains_and_is_saved_with_an_adopted_method(tmp_path):
    backbone = tiny.bert_classifier()
    trainer = classification_trainer(tmp_path, model=copy.deepcopy(backbone))
    drive(trainer, get_method("houlsby")())
    before = trainer.model.classifier.weight.clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(trainer.model.classifier.weight, before)
    opened = open_adapter(backbone, tmp_path / "saved")
    assert torch.equal(opened.classifier.weight, trainer.model.classifier.weight)


def test_a_method_on_a_model_that_is_adapted_already_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has an adapter already, and sora makes its own"):
        drive(causal_trainer(tmp_path), get_method("sora")())


def test_a_method_beside_an_optimiser_that_would_not_train_it_is_refused(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = causal_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="has an optimiser already, which would not train what"):
        drive(trainer, get_method("sora")())


def test_alora_driven_without_attach_allocates(tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.llama())
    method = get_method("alora")(rank=2, allocation=options())
    drive(trainer, method)
    trainer.train()
    assert len(method.record.rounds) == 3
    assert ranks_now(trainer.model) == present(method.record.ranks)


@pytest.mark.parametrize("name", ["alora-dnas", "ssp", "sora"])
def test_what_is_the_trainers_own_is_so_again_once_training_ends(name, tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.llama(), num_train_epochs=4)
    method = get_method(name)()
    if method.allocates:
        method.allocation = options(score="architecture")
    drive(trainer, method)
    trainer.train()
    assert (
        own_attributes(trainer)
        & {
            "_load_from_checkpoint",
            "_load_best_model",
            "_get_train_sampler",
            "create_scheduler",
        }
        == set()
    )


def test_detach_gives_trainer_and_model_back(tmp_path):
    trainer = causal_trainer(tmp_path)
    of_trainer, of_model = own_attributes(trainer), set(vars(trainer.model))
    num_callbacks = len(trainer.callback_handler.callbacks)
    attach(trainer, options())
    assert own_attributes(trainer) != of_trainer
    detach(trainer)
    assert own_attributes(trainer) == of_trainer
    assert set(vars(trainer.model)) == of_model
    assert len(trainer.callback_handler.callbacks) == num_callbacks
    trainer.train()  # plain LoRA, as asked for
    trainer.save_model(str(tmp_path / "plain"))
    assert set(ranks_now(trainer.model).values()) == {2}
    attach(trainer, options())


def test_save_pretrained_keeps_pefts_signature_and_options(tmp_path):
    trainer = causal_trainer(tmp_path)
    expected = inspect.signature(trainer.model.save_pretrained)
    attach(trainer, options())
    assert inspect.signature(trainer.model.save_pretrained) == expected
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())
    weights = {k: torch.zeros_like(v) for k, v in trainer.model.state_dict().items()}
    trainer.model.save_pretrained(tmp_path / "b", state_dict=weights)
    assert not any(v.any() for v in load_file(tmp_path / "b/adapter_model.safetensors").values())


def test_a_copy_of_the_model_saves_the_copys_weights(tmp_path):
    trainer = causal_trainer(tmp_path)
    attach(trainer, options())
    trainer.train()
    clone = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    clone.save_pretrained(tmp_path / "clone")
    saved = load_file(tmp_path / "clone" / "adapter_model.safetensors")
    now = adapter(clone)
    assert all(torch.equal(saved[name], now[name]) for name in saved)


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_saving_after_an_interrupt_before_the_first_round_is_refused(tmp_path):
    trainer = causal_trainer(tmp_path, callbacks=[_Interrupt()])
    attach(trainer, options())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError, match="no round has taken place: it is plain LoRA"):
        trainer.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_rounds", 2),
        ("ranks_per_round", 2),
        ("recovery_epochs", 0.4),
        ("score", "shapley"),
        ("min_rank", 1),
        ("seed", 5),
    ],
)
def test_resuming_with_another_option_is_refused_by_name(option, value, tmp_path):
    changes = dict(save_strategy="steps", save_steps=4)
    trainer = causal_trainer(tmp_path, callbacks=[KillAt(4)], **changes)
    attach(trainer, options())
    with pytest.raises(Interrupted):
        trainer.train()
    again = causal_trainer(tmp_path, **changes)
    attach(again, options(**{option: value}))
    before = ranks_now(again.model)
    with pytest.raises(ValueError, match=f"was begun with `{option}` of .*, and now it is"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert ranks_now(again.model) == before


def named(model, name="sql"):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name=name)


def test_the_active_adapter_is_allocated_whatever_its_name(tmp_path):
    trainer = causal_trainer(tmp_path, model=named(tiny.llama()), save_strategy="epoch")
    allocation = attach(trainer, options(ranks_per_round=2))
    trainer.train()
    now = {name: int(layer.r["sql"]) for name, layer in _layers(trainer.model, "sql").items()}
    assert now == present(allocation.record.ranks) and len(set(now.values())) > 1
    trainer.save_model(str(tmp_path / "saved"))
    assert saved_ranks(tmp_path / "saved" / "sql") == now
    assert Record.load(tmp_path / "saved").rounds == allocation.record.rounds
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved" / "sql", adapter_name="sql")
    batch = tiny.causal_batch(seed=3)
    torch.testing.assert_close(stock.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def _layers(model, name):
    from loralloc.allocation.layers import lora_layers

    return lora_layers(model, name)


def test_an_adapter_of_another_name_is_resumed(tmp_path):
    changes = dict(save_strategy="steps", save_steps=7)
    ends = []
    for resumed in (False, True):
        model = named(tiny.llama())
        trainer = causal_trainer(tmp_path, model=model, **changes)
        attach(trainer, options(ranks_per_round=2))
        checkpoint = str(tmp_path / "checkpoint-7") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    assert ends[0].keys() == ends[1].keys()
    for name, parameter in ends[0].items():
        torch.testing.assert_close(ends[1][name], parameter, rtol=0, atol=1e-6)


def test_the_adapter_to_allocate_can_be_named(tmp_path):
    model = named(tiny.llama(), "default")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    trainer = causal_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="do not train, so ranks cannot be measured"):
        attach(trainer, options(ranks_per_round=1), adapter_name="other")
    attach(trainer, options(ranks_per_round=2), adapter_name="default")
    trainer.train()
    assert len(set(int(x.r["default"]) for x in _layers(model, "default").values())) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: setattr(t, "model_init", lambda: None), "has `model_init`, which builds"),
        (lambda t: setattr(t.args, "auto_find_batch_size", True), "`auto_find_batch_size` begins"),
        (
            lambda t: setattr(t.model, "hf_device_map", {"a": 0, "b": "cpu"}),
            r"on several devices by `device_map` \(0, cpu\)",
        ),
    ],
)
def test_ways_of_running_that_cannot_be_are_refused_at_attach(change, words, tmp_path):
    trainer = causal_trainer(tmp_path)
    change(trainer)
    with pytest.raises(ValueError, match=words):
        attach(trainer, options())


def test_reentrant_checkpointing_set_on_the_model_is_seen(tmp_path):
    trainer = causal_trainer(tmp_path)
    enable = getattr(trainer.model.get_base_model(), f"{CHECKPOINTING}_enable")
    enable(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}})
    with pytest.raises(ValueError, match="The model checkpoints activations with `use_reentrant`"):
        attach(trainer, options(score="architecture"))


def test_a_method_is_given_training_examples_that_change_no_order(tmp_path):
    from loralloc.methods.lora import Lora

    class Curious(Lora):
        def begin(self, session):
            self.batches = session.training(6)

    seen = {}
    for kind in (Lora, Curious):
        with tiny.seeded(0):
            trainer = causal_trainer(tmp_path, model=tiny.llama())
            method = kind(rank=2)
            drive(trainer, method)
            trainer.train()
        seen[kind] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert sum(len(batch["labels"]) for batch in method.batches) == 6
    assert seen[Lora] == seen[Curious]


def test_the_config_of_an_allocation_takes_the_runs_seed(tmp_path):
    trainer = causal_trainer(tmp_path, seed=11)
    assert attach(trainer, options()).config.seed == 11
    assert AllocationConfig().seed is None
