"""What processes do together in `test_trained_together.py`, each with its share of a batch of 8."""

import os
from contextlib import suppress
from pathlib import Path

import methods_together
import tiny
import trainers
from peft import get_peft_model_state_dict
from transformers import Trainer

from loralloc import attach, speed_up, use_supervised_loss
from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.experiments.tiny_backbones import build
from loralloc.training.checkpoint import SafeCheckpoints

BATCH = 8


class SafeTrainer(SafeCheckpoints, Trainer):
    pass


def share_of_batch() -> int:
    return BATCH // int(os.environ.get("WORLD_SIZE", "1"))


def allocated(folder: Path, make=trainers.causal_trainer, **changes) -> dict:
    """What a run came to."""
    options, resume = changes.pop("options", {}), changes.pop("resume", None)
    changes = {"per_device_train_batch_size": share_of_batch(), "num_train_epochs": 4, **changes}
    trainer = make(folder, **changes)
    method = attach(trainer, trainers.options(**options))
    trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": list(trainers.losses(trainer).values()),
        "rounds": trainers.without_seconds(method.record.rounds),
        "ranks": trainers.ranks_now(trainer.model),
        "adapter": {n: v.tolist() for n, v in get_peft_model_state_dict(trainer.model).items()},
    }


def classes(folder: Path) -> dict:
    # Transformers multiplies a classifier's mean loss by the number of processes otherwise.
    kept = {"average_tokens_across_devices": False}
    return allocated(folder, make=trainers.classification_trainer, **kept)


def trls(folder: Path) -> dict:
    """TRL's own trainer, with its checkpointing."""
    # Where processes know of each other, Transformers saves a model in the first one only.
    models = folder / "models"
    replicas.together(lambda: build("tiny-llama", models) if replicas.is_first() else None)
    model = models / "tiny-llama"
    return allocated(folder, make=lambda *a, **k: trainers.sft_trainer(*a, model_folder=model, **k))


def sped_up(folder: Path) -> dict:
    def make(*args, **changes):
        trainer = trainers.causal_trainer(*args, **changes)
        use_supervised_loss(trainer)
        speed_up(trainer.model)
        return trainer

    return allocated(folder, make=make)


def killed(folder: Path, **changes) -> dict:
    """A run that ends after step 4, between two rounds, and goes on."""
    saving = {**changes, "save_strategy": "steps", "save_steps": 4}
    with suppress(trainers.Interrupted):
        allocated(folder, callbacks=[trainers.KillAt(4)], **saving)
    return allocated(folder, resume=True, **saving)


def with_dropout(*args, **changes):
    model = tiny.adapted(tiny.llama(), r=2, lora_dropout=0.2)
    trainer = trainers.causal_trainer(*args, model=model, **changes)
    trainer.__class__ = SafeTrainer
    return trainer


def grown_apart(folder: Path) -> dict:
    """A weight that is another in the last process alone, from step 2 on."""

    class Shift(trainers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **_):
            if state.global_step == 1 and args.process_index == args.world_size - 1 > 0:
                layer = list(lora_layers(model).values())[3]
                weight_b(layer).data[0, 0] += 1e-6

    return allocated(folder, callbacks=[Shift()])


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {
        "gradient": lambda: allocated(folder / "gradient"),
        "sensitivity": lambda: allocated(folder / "sen", options={"score": "sensitivity"}),
        "architecture": lambda: allocated(folder / "arc", options={"score": "architecture"}),
        "screened": lambda: allocated(folder / "scr", options={"score": "screened"}),
        "worth": lambda: allocated(
            folder / "worth", options={"policy": "worth", "new_rows": "gradient"}
        ),
        "classes": lambda: classes(folder / "classes"),
        "TRL's": lambda: trls(folder / "trl"),
        "sped up": lambda: sped_up(folder / "fast"),
        "accumulated": lambda: allocated(
            folder / "acc",
            per_device_train_batch_size=max(1, share_of_batch() // 2),
            gradient_accumulation_steps=2,
        ),
        "the best": lambda: allocated(
            folder / "best",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        ),
        "killed": lambda: killed(folder / "killed"),
        "dropout": lambda: allocated(folder / "drop", make=with_dropout),
        "dropout, killed": lambda: killed(folder / "dropped", make=with_dropout),
        "grown apart": lambda: grown_apart(folder / "apart"),
        "gates": lambda: methods_together.trained("sora", folder / "gates"),
    }
