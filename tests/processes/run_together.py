"""Whole runs of `loralloc train` in `test_run_together.py`, alike in any number."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file
from trained_together import share_of_batch

from loralloc.cli import main

APART = True
"""Every command has processes of its own."""

ROUNDS = (
    "--lora_r=2",
    "--num_rounds=2",
    "--warmup_epochs=0.5",
    "--recovery_epochs=0.5",
    "--scoring_examples=8",
)


def loralloc(*words) -> dict:
    """What the command gave here: its exit code and its lines."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def train(folder: Path, *more, rounds=ROUNDS) -> dict:
    root = folder.parent.parent
    return loralloc(
        *("train", "--output_dir", folder, "--model_name_or_path", root / "model"),
        *("--dataset_name", root / "data", "--num_train_epochs", 2, "--learning_rate", 1e-2),
        *("--dtype", "float32", "--logging_steps", 1),
        *("--per_device_train_batch_size", share_of_batch(), *rounds, *more),
    )


def found_in(folder: Path) -> dict:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    weights = load_file(folder / "adapter_model.safetensors")
    record = folder / "allocation.json"
    rounds = json.loads(record.read_text())["rounds"] if record.exists() else []
    return {
        "losses": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "rounds": [{**entry, "seconds": 0} for entry in rounds],
        "adapter": {name: value.flatten().tolist() for name, value in weights.items()},
    }


def whole(folder: Path, *more, **options) -> dict:
    told = train(folder, *more, **options)
    is_main = os.environ.get("RANK", "0") == "0"
    return {"told": told, **(found_in(folder) if is_main and not told["code"] else {})}


def goes_on(folder: Path, began: int) -> dict:
    """A run that so many processes began, from its checkpoint after step 2 of 8."""
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        shutil.copytree(folder.parent.parent / f"{began}" / "saved", folder)
        for path in folder.glob("checkpoint-*"):
            if path.name != "checkpoint-2":
                shutil.rmtree(path)
    told = loralloc("train", "--resume", "--output_dir", folder)
    return {"told": told, **(found_in(folder) if is_main and not told["code"] else {})}


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    saving = ("--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9)
    saving = (*saving, "--score", "sensitivity")
    return {
        "alora": lambda: whole(folder / "alora"),
        "again": lambda: whole(folder / "alora"),
        "full": lambda: whole(folder / "full", "--method", "full", rounds=()),
        "saved": lambda: whole(folder / "saved", *saving),
        "goes on from 1": lambda: goes_on(folder / "resumed-1", 1),
        "goes on from 2": lambda: goes_on(folder / "resumed-2", 2),
    }
