"""Giving a model the ranks of a saved adapter, so that its weights can be loaded."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

from loralloc.allocation.layers import lora_config, lora_layers, ranks
from loralloc.allocation.resize import resize

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
KEY_SUFFIX = ".lora_A.weight"


def saved_ranks(folder: str | Path) -> dict[str, int]:
    """The rank of every module of a saved adapter, read from the shapes of its tensors."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS_NAME}; name a folder that an adapter was saved to."
        )
    with safe_open(path, framework="pt") as tensors:
        return {
            key.removeprefix(KEY_PREFIX).removesuffix(KEY_SUFFIX): tensors.get_slice(
                key
            ).get_shape()[0]
            for key in tensors.keys()  # noqa: SIM118 - not a dict
            if key.endswith(KEY_SUFFIX)
        }


def check_scaling(model: nn.Module, folder: str | Path) -> None:
    """Refuse to go on from an adapter whose scaling this model's adapter does not share.

    Raises:
        ValueError: The rank at the start, alpha or rsLoRA differ.
    """
    saved, now = LoraConfig.from_pretrained(str(folder)), lora_config(model)
    for option in ("r", "lora_alpha", "use_rslora"):
        before, after = getattr(saved, option), getattr(now, option)
        if before != after:
            raise ValueError(
                f"The run in {folder} began with `{option}` of {before}, and now it is {after}, "
                "which would change the scaling of every rank; resume with the value it began with."
            )


def restore_shapes(
    model: nn.Module, folder: str | Path, *, optimizer: Optimizer | None = None
) -> None:
    """Resize a model's adapter to the ranks of a saved one; its weights are still to be loaded.

    Args:
        model: A PEFT model with a LoRA adapter on at least the modules of the saved one.
        folder: Where the adapter was saved.
        optimizer: The optimiser that trains the adapter, where there is one already.

    Raises:
        ValueError: The saved adapter has a module that the model's adapter lacks.
    """
    target = saved_ranks(folder)
    now = ranks(lora_layers(model))
    missing = [name for name in target if name not in now]
    if missing:
        raise ValueError(
            f"The adapter in {folder} has a module that this model's adapter lacks ({missing[0]}); "
            "build the model anew with the options of the saved run."
        )
    resize(model, {name: target.get(name, 0) for name in now}, optimizer=optimizer)
