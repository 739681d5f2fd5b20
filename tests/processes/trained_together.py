"""What processes do together in `test_trained_together.py`, each with its share of a batch of 8."""

import os
from pathlib import Path

import trainers
from peft import get_peft_model_state_dict

from loralloc import attach

BATCH = 8


def share_of_batch() -> int:
    return BATCH // int(os.environ.get("WORLD_SIZE", "1"))


def told(trainer, method) -> dict:
    """What a run came to."""
    return {
        "losses": list(trainers.losses(trainer).values()),
        "rounds": trainers.without_seconds(method.record.rounds),
        "ranks": trainers.ranks_now(trainer.model),
        "adapter": {n: v.tolist() for n, v in get_peft_model_state_dict(trainer.model).items()},
    }


def allocated(folder: Path, make=trainers.causal_trainer, **changes) -> dict:
    options = changes.pop("options", {})
    changes = {"per_device_train_batch_size": share_of_batch(), "num_train_epochs": 4, **changes}
    trainer = make(folder, **changes)
    method = attach(trainer, trainers.options(**options))
    trainer.train()
    return told(trainer, method)


def classes(folder: Path) -> dict:
    # Transformers multiplies a classifier's mean loss by the number of processes otherwise.
    kept = {"average_tokens_across_devices": False}
    return allocated(folder, make=trainers.classification_trainer, **kept)


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {
        "gradient": lambda: allocated(folder / "gradient"),
        "classes": lambda: classes(folder / "c"),
        "sensitivity": lambda: allocated(folder / "s", options={"score": "sensitivity"}),
        "architecture": lambda: allocated(folder / "a", options={"score": "architecture"}),
        "screened": lambda: allocated(folder / "sc", options={"score": "screened"}),
    }
