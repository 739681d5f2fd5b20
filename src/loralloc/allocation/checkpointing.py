"""Activation checkpointing in evaluation mode, where Transformers switches it off.

A layer of Transformers has its activations computed again in the backward pass where it is asked to
and is training. Training mode is also what dropout goes by, in some layers' own code. So while
losses are measured the layers stay in evaluation mode, and what the training step does around
their `forward` is done here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

CACHES = ("past_key_values", "layer_past")
"""Names under which layers are given a cache, which computing them again would fill twice."""


@contextmanager
def checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Layers whose activations are computed again in training do so in evaluation, inside.

    Reentrant checkpointing gives no gradient of chosen tensors, and rests.
    """
    layers = [layer for layer in model.modules() if _is_checkpointed(layer)]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def can_be_kept(model: nn.Module) -> bool:
    """Whether the model's layers are of the kind that `checkpointing_kept` knows."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def _is_checkpointed(module: nn.Module) -> bool:
    if not (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
        return False
    function = module._gradient_checkpointing_func
    return not getattr(function, "keywords", {}).get("use_reentrant", False)


def _recomputed(layer: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer so that only what it reads is kept, where there is a graph to keep it for."""
    if not (torch.is_grad_enabled() and layer.gradient_checkpointing):
        return forward(*args, **kwargs)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if not layer._can_checkpoint_with_cache:
        kwargs |= dict.fromkeys(name for name in CACHES if name in kwargs)
    return layer._gradient_checkpointing_func(functools.partial(forward, **kwargs), *args)
