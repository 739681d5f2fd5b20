"""Every method in `test_methods_together.py`, each process with its share of a batch of 4."""

import os
from pathlib import Path

import given
import tiny
import trainers
from peft import TaskType
from safetensors.torch import load_file

from loralloc.methods.catalog import METHODS, get_method
from loralloc.training.drive import drive

BATCH = 4

BY_BATCH = {"increlora", "shrink", "eva", "gora"}
"""Methods to which processes are what accumulation is: they look at one batch after the other, or
at held-out examples in batches of a size that goes by that of training."""


def trained(name: str, folder: Path) -> dict:
    number, index = (int(os.environ.get(key, default)) for key, default in CAST)
    method = get_method(name)(**given.options(name))
    model = tiny.llama()
    with tiny.seeded(4):
        method.fit(model, 3000)
        method.prepare(model, task_type=TaskType.CAUSAL_LM)
    batch, accumulated = BATCH // number, 1
    if number == 1 and name in BY_BATCH:
        batch, accumulated = BATCH // 2, 2
    trainer = trainers.causal_trainer(
        folder,
        model=method.model,
        num_train_epochs=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )
    drive(trainer, method)
    trainer.train()
    method.save(folder / f"{name}-{index}")
    saved = load_file(folder / f"{name}-{index}" / "adapter_model.safetensors")
    return {
        "losses": list(trainers.losses(trainer).values()),
        "found": method.findings(),
        "shapes": {key: list(value.shape) for key, value in saved.items()},
        "adapter": {key: value.flatten().tolist() for key, value in saved.items()},
    }


CAST = (("WORLD_SIZE", "1"), ("RANK", "0"))


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {name: lambda name=name: trained(name, folder) for name in METHODS}
