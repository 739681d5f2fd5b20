"""What processes do together in `test_sharded.py`, each with a part of the backbone."""

import json
import os
from pathlib import Path

import tiny
import torch
import trainers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from trained_together import allocated
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from loralloc import drive, get_method


def backbone(folder: Path):
    """A tiny Llama, its weights divided among the processes."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    source = folder.parent.parent / "model"
    options = {}
    if number > 1:
        options["distributed_config"] = DistributedConfig(fsdp_size=number)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if number > 1:
        assert any(isinstance(weight, DTensor) for weight in loaded.parameters())
    return loaded


def model(folder: Path):
    """With an adapter, which every process has whole."""
    return tiny.adapted(backbone(folder), r=2)


def run(folder: Path, **changes) -> dict:
    return allocated(folder, model=model(folder), **changes)


def saved(folder: Path) -> dict:
    """What the last checkpoint holds, whole, and what the run came to."""
    found = allocated(
        folder,
        model=model(folder),
        save_strategy="steps",
        save_steps=4,
        save_only_model=True,
    )
    weights = load_file(folder / "checkpoint-12" / "adapter_model.safetensors")
    whole = {name: value.tolist() for name, value in weights.items()}
    assert whole == found["adapter"]
    config = json.loads((folder / "checkpoint-12" / "adapter_config.json").read_text())
    return {**found, "rank_pattern": config["rank_pattern"]}


def refused(folder: Path) -> dict:
    drive(trainers.causal_trainer(folder, model=backbone(folder)), get_method("sora")(rank=2))
    return {}


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {
        "saved": lambda: saved(folder / "saved"),
        "screened": lambda: run(folder / "screened", options={"score": "screened"}),
        "sensitivity": lambda: run(folder / "sens", options={"score": "sensitivity"}),
        "refused": lambda: refused(folder / "sora"),
    }
