"""A LoRA adapter in a folder that MLX-LM loads with `--adapter-path`.

MLX-LM has one rank and one scale for all modules and computes scale * (x A) B, so that A has shape
(in_features, num_ranks) and B (num_ranks, out_features) there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loralloc.adapters.folder import CONFIG, PREFIX
from loralloc.adapters.forms import Form, kind_of
from loralloc.allocation.files import read_json, read_tensors

WEIGHTS = "adapters.safetensors"
"""Its tensors."""

PREFIXES = {"model.layers.": "model.layers.", "transformer.h.": "model.h."}
"""How the names of a layer's modules begin in MLX-LM, by how they begin in Transformers."""


def write_mlx(folder: Path, form: Form, num_layers: int) -> None:
    """Write an adapter into a folder that is there.

    Args:
        folder: The folder.
        form: As `forms.portable` gives it.
        num_layers: Layers of the backbone.

    Raises:
        ValueError: The adapter has what MLX-LM does not load.
    """
    tensors, keys = {}, set()
    for key, tensor in form.tensors.items():
        name, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        if not name:
            raise ValueError(
                f"The adapter holds {key} beside its ranks, and MLX-LM loads ranks only; use "
                "`--to merged`."
            )
        tensors[f"{_to_mlx(name)}.lora_{end[0].lower()}"] = tensor.T.contiguous()
        keys.add(kind_of(name).rpartition("*.")[2])
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": form.config["r"],
            "scale": form.config["lora_alpha"] / form.config["r"],
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)


def read_mlx(folder: Path) -> dict[str, Tensor]:
    """What a folder adds to the weights, shape (out_features, in_features), by module."""
    options = read_json(folder / CONFIG)["lora_parameters"]
    tensors = read_tensors(folder / WEIGHTS)
    deltas = {}
    for key, a in tensors.items():
        name, _, which = key.rpartition(".lora_")
        if which == "a":
            b = tensors[f"{name}.lora_b"]
            deltas[_from_mlx(name)] = options["scale"] * (a.float() @ b.float()).T
    return deltas


def _to_mlx(name: str) -> str:
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(
        f"{name} has a name that is not known from MLX-LM, whose adapters are on the layers of "
        "models like Llama, Qwen and GPT-2; use `--to merged`."
    )


def _from_mlx(name: str) -> str:
    for ours, theirs in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ValueError(f"{name} is no module of a layer.")
