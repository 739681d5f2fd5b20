"""What a quantised backbone needs so that LoRA trains on it as it does on any other.

On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights for inference at the first forward pass
in evaluation mode, for good. A product with packed weights has no gradient of its input: after one
evaluation, or one look at importance, nothing would reach the layers below. And TRL casts the
weights that train to bfloat16, which has 8 bits: an update below half a unit in the last place is
lost. At a learning rate of 1e-4 most of A would stand still, and a rank that a late round gives
stay where it was drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

PACKS = "support_avx512bf16_for_cpu"
"""What bitsandbytes calls a 4-bit layer's leave to pack its weight."""


def keep_unpacked(model: nn.Module) -> None:
    """Let 4-bit layers keep weights that gradients go through, in evaluation too.

    Args:
        model: Any model; other layers stay as they are.

    Raises:
        ValueError: One is packed already.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, PACKS):
            setattr(layer, PACKS, False)
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"An evaluation before has let bitsandbytes pack the 4-bit weight of {name} "
                    "for inference on this processor, and no gradient passes a packed one; load "
                    "the model again, and attach before it is evaluated."
                )


def train_in_float32(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Cast the LoRA weights that train in half precision to float32, in place.

    Weights that an optimiser keeps state of stay as they are: its state has their type.

    Args:
        model: The adapted model.
        optimizer: What trains it, if there is something already.

    Returns:
        How many were cast.
    """
    known: Any = optimizer.state if optimizer is not None else {}
    halves = [
        weight
        for name, weight in model.named_parameters()
        if "lora_" in name
        and weight.requires_grad
        and weight.dtype in (torch.bfloat16, torch.float16)
        and not known.get(weight)
    ]
    for weight in halves:
        weight.data = weight.data.float()
    return len(halves)
