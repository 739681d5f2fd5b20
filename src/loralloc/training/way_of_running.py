"""How a trainer runs: its length, whether it is compiled, and what a method cannot work with.

A compiled model is compiled anew for every shape of its parameters, and dynamo keeps what it made
for the shapes before. From its limit on, 8 by default, it runs the model uncompiled and says so
nowhere but in its own log. The ranks before a round do not come back, so what was compiled for
them is dropped, and the count begins anew.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.layers import base_model
from loralloc.methods.alora import Alora
from loralloc.methods.method import Method
from loralloc.methods.session import Length

ACTS = ("begin", "before_step", "step", "after_step", "extra_loss")
"""Hooks by which a method acts on a run, beyond adapting its model."""


def check_given(trainer: Any, method: Any) -> None:
    """Refuse what is no trainer, or no method that is made.

    Raises:
        TypeError: Naming what was given.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"The first argument is a {type(trainer).__name__}; give a transformers.Trainer."
        )
    if not isinstance(method, Method):
        given = method if isinstance(method, str) else getattr(method, "__name__", type(method))
        raise TypeError(
            f"The method is {given!r}; give one that is made, as in "
            "drive(trainer, get_method('sora')(rank=8))."
        )


def check_way_of_running(trainer: Trainer, method: Method) -> None:
    """Refuse a trainer whose way of running a method does not fit.

    Raises:
        TypeError: It shards or copies what the method changes, or scales the loss it reads.
        ValueError: An option of the trainer's builds the model or its batches anew.
    """
    _check_processes(trainer, method)
    _check_sharding(trainer, method)
    _check_unused(trainer, method)
    _check_seeds(trainer, method)
    if acts_between_steps(method) and trainer.args.fp16 and not method.bears_scaled_loss():
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
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise TypeError(
            f"This process was started as one of {started}, but its trainer trains alone, so that "
            "each would train a model of its own; on a CPU give the trainer `use_cpu=True`, or "
            "start one process."
        )
    if args.n_gpu > 1:
        raise TypeError(
            f"There are {args.n_gpu} GPUs and one process, which would copy the model at every "
            f"step, where {method.about.name} does not reach; start a process for each GPU with "
            "`torchrun --nproc_per_node gpu`, or make a single GPU visible with "
            "CUDA_VISIBLE_DEVICES."
        )


def _check_sharding(trainer: Trainer, method: Method) -> None:
    args = trainer.args
    # On a CPU Accelerate leaves out what was asked for, without a word.
    fsdp = trainer.is_fsdp_enabled or args.fsdp_plugin_args is not None or _asks("FSDP")
    for way, is_on in (
        ("FSDP", fsdp),
        ("DeepSpeed", trainer.is_deepspeed_enabled or args.deepspeed or _asks("DEEPSPEED")),
    ):
        if is_on:
            raise TypeError(
                f"{way} keeps a part of the parameters in each process, where adapters are not "
                "trained or saved whole here; load the model with "
                "`distributed_config=DistributedConfig(fsdp_size=...)`, by which adapters stay "
                "whole, or start the processes with `torchrun` or `accelerate launch "
                "--multi_gpu`, so that each has the whole model."
            )
    if trainer.is_distributed_loading_by_transformers:
        _check_loaded_in_parts(trainer, method)


def _check_loaded_in_parts(trainer: Trainer, method: Method) -> None:
    """Refuse what is not whole, or not alike, in processes that hold parts of a backbone."""
    if not isinstance(method, Alora) and acts_between_steps(method):
        raise TypeError(
            f"The model is loaded in parts, and {method.about.name} acts between steps on all of "
            "it; start the processes with `torchrun`, so that each has the whole model."
        )
    base: Any = base_model(trainer.model)
    config = base.config.distributed_config
    for name in ("tp_size", "pp_size", "ep_size"):
        if (getattr(config, name) or 1) > 1:
            raise TypeError(
                f"`distributed_config` has `{name}` {getattr(config, name)}, by which a process "
                "computes a part of each layer and adapters are cut up with it; use `fsdp_size`."
            )
    cut = [name for name, p in trainer.model.named_parameters() if p.requires_grad and _is_cut(p)]
    if cut:
        raise TypeError(
            f"The model is loaded in parts, and {cut[0]}, which trains, is one of them; leave it "
            "out of `modules_to_save`, or start the processes with `torchrun`, so that each has "
            "the whole model."
        )


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether a process holds a part of the parameter, as a DTensor."""
    return hasattr(parameter, "placements")


def _asks(way: str) -> bool:
    """Whether `accelerate launch` was told to use a way of sharding."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "").lower() in ("1", "true", "yes")


def check_shared_batches(trainer: Trainer) -> None:
    """Refuse batches that are cut up for the processes, where halves of the data are placed.

    Raises:
        ValueError: `split_batches` is on.
    """
    if trainer.args.world_size > 1 and trainer.accelerator.split_batches:
        raise ValueError(
            "`accelerator_config` has `split_batches`, by which processes share a batch, while one "
            "half of the training examples is kept back batch by batch; leave it out and lower "
            "`per_device_train_batch_size`."
        )


def _check_seeds(trainer: Trainer, method: Method) -> None:
    seeds = replicas.gathered((trainer.args.seed, trainer.args.data_seed))
    if acts_between_steps(method) and len(set(seeds)) > 1:
        raise ValueError(
            f"The processes have other seeds ({', '.join(str(seed) for seed, _ in seeds)}), by "
            "which examples are ordered and divided; give all the same `seed` and `data_seed`."
        )


def _check_unused(trainer: Trainer, method: Method) -> None:
    handler = trainer.accelerator.ddp_handler
    looks = handler is not None and handler.find_unused_parameters
    if trainer.args.world_size > 1 and method.leaves_out and not looks:
        raise ValueError(
            f"{method.about.name} leaves out parameters in some steps, and with gradient "
            "checkpointing Trainer lets the processes wait for the gradients of all; set "
            "`ddp_find_unused_parameters=True`, or leave out `gradient_checkpointing`."
        )


def _check_devices(trainer: Trainer) -> None:
    places: Any = getattr(trainer.model, "hf_device_map", None) or {}
    devices = sorted({str(device) for device in places.values()})
    if len(devices) > 1:
        raise ValueError(
            f"The model lies on several devices by `device_map` ({', '.join(devices)}), between "
            "which ranks and scores cannot be moved yet; load it onto one device."
        )


def is_compiled(trainer: Trainer) -> bool:
    """Whether a trainer's model is compiled or will be: by the trainer, by Accelerate or before."""
    plugin = trainer.accelerator.state.dynamo_plugin
    will_be = trainer.args.torch_compile or plugin.backend != DynamoBackend.NO
    return bool(will_be) or any(map(_is_compiled, trainer.model.modules()))


def compile_anew(trainer: Trainer) -> None:
    """Let a compiled model be compiled for its new ranks, as if for the first time.

    To be called when shapes have changed. Nothing happens where nothing is compiled.

    Args:
        trainer: Its model may be compiled, wholly or in parts.
    """
    if is_compiled(trainer):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is a wrapper of `torch.compile`, or was compiled in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def planned_length(trainer: Trainer) -> Length:
    """Optimiser steps of an epoch and of the whole run, as the trainer will count them.

    Raises:
        ValueError: The training set has no length.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Rounds are placed by epochs, but the training set is a {type(dataset).__name__} "
            "without a length; use a dataset with a length."
        )
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return Length(steps_per_epoch=int(values[1]), num_steps=int(values[6]))
