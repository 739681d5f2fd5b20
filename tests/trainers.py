"""Tiny trainers to attach an allocation to, and what is read off them afterwards."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from loralloc import attach
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.record import Round

STEPS_PER_EPOCH = 6


def options(**changes) -> AllocationConfig:
    """Rounds after steps 3, 6 and 9 of a run with 6 steps an epoch."""
    usual = dict(num_rounds=3, warmup_epochs=0.5, recovery_epochs=0.5, scoring_examples=4)
    return AllocationConfig(**{**usual, **changes})


def arguments(folder, **changes) -> dict:
    usual = dict(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return {**usual, **changes}


def causal_trainer(folder, *, model=None, num_eval=8, **changes) -> Trainer:
    return _plain_trainer(
        model or tiny.adapted(tiny.llama(), r=2),
        arguments(folder, **changes),
        train=causal_rows(4 * STEPS_PER_EPOCH),
        evaluation=causal_rows(num_eval, seed=1) if num_eval else None,
    )


def classification_trainer(folder, *, model=None, num_eval=8, **changes) -> Trainer:
    return _plain_trainer(
        model or tiny.adapted(tiny.bert_classifier(), r=2),
        arguments(folder, **changes),
        train=_rows(tiny.classification_batch(4 * STEPS_PER_EPOCH)),
        evaluation=_rows(tiny.classification_batch(num_eval, seed=1)),
    )


def sft_trainer(folder, *, model_folder, **changes) -> SFTTrainer:
    """TRL's own trainer, which is given the adapter's configuration and makes the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def rows(count):
        return Dataset.from_dict(
            {
                "prompt": [f"the film {number} is" for number in range(count)],
                "completion": [(" good", " bad")[number % 2] for number in range(count)],
            }
        )

    targets = ["q_proj", "v_proj", "up_proj"]
    callbacks = changes.pop("callbacks", None)
    torch.manual_seed(0)  # TRL before 1.16 draws the adapter before it sets the seed
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=SFTConfig(**arguments(folder, **{"bf16": False, **changes})),
        callbacks=callbacks,
        train_dataset=rows(4 * STEPS_PER_EPOCH),
        eval_dataset=rows(8),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    )


def following(values) -> dict:
    """Arguments of a trainer that evaluates and saves every step, with a scripted metric."""
    return dict(
        compute_metrics=lambda _: {"scripted": float(next(values))},
        metric_for_best_model="scripted",
        greater_is_better=True,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )


def causal_rows(count: int, seed: int = 0) -> Dataset:
    return _rows(tiny.causal_batch(count, seed=seed))


def adapter(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors as they would be saved, copied."""
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def ranks_now(model: PeftModel) -> dict[str, int]:
    return ranks(lora_layers(model))


def present(counts: dict[str, int]) -> dict[str, int]:
    """Without the modules that left the adapter."""
    return {name: rank for name, rank in counts.items() if rank}


def losses(trainer: Trainer) -> dict[int, float]:
    """The training loss by step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def without_seconds(rounds: list[Round]) -> list[dict]:
    names = [field.name for field in fields(Round) if field.name != "seconds"]
    return [{name: getattr(entry, name) for name in names} for entry in rounds]


class Interrupted(Exception):
    """Stands for a kill: nothing of the trainer runs after it."""


class KillAt(TrainerCallback):
    """End a run from outside once a step's checkpoint, if any, is written."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Interrupted


def killed_and_resumed(build: Callable[..., Trainer], *, save_steps: int):
    """A run that was killed after step 8 and went on from its newest checkpoint, and its method."""
    saving = dict(save_strategy="steps", save_steps=save_steps)
    killed = build(**saving, callbacks=[KillAt(8)])
    attach(killed, options())
    with pytest.raises(Interrupted):
        killed.train()
    resumed = build(**saving)
    allocation = attach(resumed, options())
    resumed.train(resume_from_checkpoint=True)
    return resumed, allocation


class StopAt(TrainerCallback):
    """Ask the trainer to end after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = True


def _plain_trainer(model, usual, *, train, evaluation) -> Trainer:
    callbacks = usual.pop("callbacks", None)
    optimizers = usual.pop("optimizers", (None, None))
    compute_metrics = usual.pop("compute_metrics", None)
    return Trainer(
        model=model,
        args=TrainingArguments(**usual),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        callbacks=callbacks,
        optimizers=optimizers,
        compute_metrics=compute_metrics,
    )


def _rows(batch: dict[str, Tensor]) -> Dataset:
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
