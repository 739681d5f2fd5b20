"""Rounds under `torch.compile`.

A compiled model is compiled anew for every shape of its parameters, and dynamo keeps what it made
for the shapes before. From its limit on, 8 by default, it runs the model uncompiled and says so
nowhere but in its own log. The ranks before a round do not come back, so what was compiled for
them is dropped, and the count begins anew.
"""

from __future__ import annotations

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer


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
