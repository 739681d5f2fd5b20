"""Ways of running in which a method could not do what it is for: refused before the first step."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import Method

ACTS = ("before_step", "step", "after_step", "extra_loss")
"""Hooks by which a method acts on a run, beyond adapting its model."""


def check_way_of_running(trainer: Trainer, method: Method) -> None:
    """Refuse a trainer whose way of running a method does not fit.

    Raises:
        TypeError: It shards or copies what the method changes, or scales the loss it reads.
        ValueError: An option of the trainer's builds the model or its batches anew.
    """
    _check_processes(trainer, method)
    _check_sharding(trainer, method)
    if acts_between_steps(method) and trainer.args.fp16 and not method.bears_scaled_loss:
        raise TypeError(
            f"The run is in fp16, whose loss is scaled and whose steps may be skipped, and "
            f"{method.about.name} reads gradients between steps; train with bf16 or in float32."
        )
    if trainer.model_init is not None:
        raise ValueError(
            "The trainer has `model_init`, which builds the model anew when training begins, "
            "without what was done to it here; build the model first and give it as `model`."
        )
    if trainer.args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` begins the run again with other batches, and so with another "
            "number of steps, after rounds or searches were placed; set "
            "`per_device_train_batch_size`."
        )
    _check_devices(trainer)


def check_checkpointing(trainer: Trainer) -> None:
    """Refuse reentrant checkpointing, for a method that lets gates or choices learn by themselves.

    Raises:
        ValueError: It is set in the trainer's arguments or on the model.
    """
    for option in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(trainer.args, option, None) or {}).get("use_reentrant"):
            raise ValueError(_reentrant(f"`{option}` has"))
    for module in trainer.model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(_reentrant("The model checkpoints activations with"))


def _reentrant(where: str) -> str:
    return (
        f"{where} `use_reentrant`, under which PyTorch gives no gradient of the gates alone; set "
        "it to False."
    )


def acts_between_steps(method: Method) -> bool:
    """Whether a method acts on a run, beyond adapting its model."""
    kind = type(method)
    return any(getattr(kind, name) is not getattr(Method, name) for name in ACTS)


def _check_processes(trainer: Trainer, method: Method) -> None:
    args = trainer.args
    if isinstance(method, InPlaceMethod) and args.n_gpu > 1:
        raise TypeError(
            f"There are {args.n_gpu} GPUs, between which one process would copy the model "
            f"without the hooks of {method.about.name}; make a single GPU visible with "
            "CUDA_VISIBLE_DEVICES."
        )
    count = max(args.world_size, args.n_gpu)
    if acts_between_steps(method) and count > 1:
        raise TypeError(
            f"The run has {count} processes or GPUs, and {method.about.name} acts between steps, "
            "which takes place in one process on one device so far: make a single GPU visible with "
            "CUDA_VISIBLE_DEVICES and start one process."
        )


def _check_sharding(trainer: Trainer, method: Method) -> None:
    for way, is_on in (
        ("FSDP", trainer.is_fsdp_enabled),
        ("DeepSpeed", trainer.is_deepspeed_enabled),
    ):
        if is_on and acts_between_steps(method):
            raise TypeError(
                f"{way} shards the parameters that {method.about.name} replaces or reads between "
                "steps, so it cannot be used under it; run in one process."
            )


def _check_devices(trainer: Trainer) -> None:
    places: Any = getattr(trainer.model, "hf_device_map", None) or {}
    devices = sorted({str(device) for device in places.values()})
    if len(devices) > 1:
        raise ValueError(
            f"The model lies on several devices by `device_map` ({', '.join(devices)}), between "
            "which ranks and scores cannot be moved yet; load it onto one device."
        )
