"""Giving a model the ranks of a saved adapter, so that its weights can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

from loralloc.adapters.folder import CONFIG
from loralloc.adapters.stranger import check_config
from loralloc.allocation.files import read_json, read_tensors
from loralloc.allocation.layers import lora_config, lora_layers, ranks
from loralloc.allocation.resize import resize

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
KEY_SUFFIX = ".lora_A.weight"


def adapter_folder(folder: str | Path, adapter_name: str) -> Path:
    """Where PEFT puts an adapter below a folder that a model is saved to."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


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


def check_scaling(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Refuse to go on from an adapter whose scaling this model's adapter does not share.

    Raises:
        ValueError: The rank at the start, alpha or rsLoRA differ.
    """
    where = adapter_folder(folder, adapter_name)
    check_config(read_json(where / CONFIG), (), where=str(where))
    saved = LoraConfig.from_pretrained(str(where))
    now = lora_config(model, adapter_name)
    for option in ("r", "lora_alpha", "use_rslora"):
        before, after = getattr(saved, option), getattr(now, option)
        if before != after:
            raise ValueError(
                f"The run in {folder} began with `{option}` of {before}, and now it is {after}, "
                "which would change the scaling of every rank; resume with the value it began with."
            )


def restore_shapes(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str = "default",
) -> None:
    """Resize a model's adapter to the ranks of a saved one; its weights are still to be loaded.

    Args:
        model: A PEFT model with a LoRA adapter on at least the modules of the saved one.
        folder: Where the model was saved.
        optimizer: The optimiser that trains the adapter, where there is one already.
        adapter_name: PEFT's name of the adapter.

    Raises:
        ValueError: The saved adapter has a module that the model's adapter lacks.
    """
    target = ranks_for(model, folder, adapter_name=adapter_name)
    give_ranks(model, target, str(folder), optimizer=optimizer, adapter_name=adapter_name)


def ranks_for(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default"
) -> dict[str, int]:
    """The ranks of a saved adapter, by the names that a model's adapter of the same kind has.

    Args:
        model: A PEFT model with a LoRA adapter.
        folder: Where a model was saved.
        adapter_name: PEFT's name of the adapter.
    """
    saved, layers = adapter_folder(folder, adapter_name), lora_layers(model, adapter_name)
    wrapped = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    return _by_parameter(saved, saved_ranks(saved), wrapped)


def give_ranks(
    model: nn.Module,
    target: Mapping[str, int],
    where: str,
    *,
    optimizer: Optimizer | None = None,
    adapter_name: str = "default",
) -> None:
    """Resize a model's adapter to the ranks of another time; its weights are still to be loaded.

    Args:
        model: A PEFT model with a LoRA adapter on at least the modules that have ranks.
        target: The rank of every module; one that is not named has none.
        where: What the ranks are from, for people.
        optimizer: The optimiser that trains the adapter, where there is one already.
        adapter_name: PEFT's name of the adapter.

    Raises:
        ValueError: A module has ranks that the model's adapter lacks.
    """
    now = ranks(lora_layers(model, adapter_name), adapter_name)
    missing = [name for name, rank in target.items() if rank and name not in now]
    if missing:
        raise ValueError(
            f"The adapter in {where} has a module that this model's adapter lacks ({missing[0]}); "
            "build the model anew with the options of the saved run."
        )
    wanted = {name: target.get(name, 0) for name in now}
    resize(model, wanted, optimizer=optimizer, adapter_name=adapter_name)


def _by_parameter(folder: Path, saved: Mapping[str, int], wrapped: Sequence[str]) -> dict[str, int]:
    """Saved ranks with those of experts by the names of their parameters.

    Tensors are named by the module that has the parameters, and by `base_layer` within it for all
    but the last; which are which, and how many ranks each has, only the configuration tells.

    Args:
        folder: Where the adapter was saved.
        saved: Rows of A, by the names of tensors.
        wrapped: Parameters that the model's adapter is on.
    """
    config, found = LoraConfig.from_pretrained(str(folder)), dict(saved)
    wanted, pattern = config.target_parameters or (), config.rank_pattern
    for name in wrapped:
        module = name.rpartition(".")[0]
        tensors = (key for key in found if key.replace(".base_layer", "") == module)
        key = next(tensors, None)
        if key and any(name == one or name.endswith(f".{one}") for one in wanted):
            del found[key]
            found[name] = pattern.get(get_pattern_key(pattern.keys(), name), config.r)
    return found


def load_weights(model: Any, folder: str | Path) -> None:
    """Give a PEFT model the weights of every adapter of its that a folder holds."""
    for name in model.peft_config:
        path = adapter_folder(folder, name) / WEIGHTS_NAME
        if path.is_file():
            set_peft_model_state_dict(model, read_tensors(path), adapter_name=name)
