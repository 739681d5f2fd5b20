"""The fast step of `loralloc train` for everybody's own training loop, from one line."""

from __future__ import annotations

from typing import NamedTuple

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from loralloc.allocation.layers import base_model
from loralloc.kernels.attention import NAME, use_short_attention
from loralloc.kernels.lora import fuse, is_covered


class SpedUp(NamedTuple):
    """What `speed_up` has done to a model."""

    num_layers: int
    """LoRA layers that take the fused step in training."""

    num_others: int
    """LoRA layers that run PEFT's own forward: with dropout or DoRA, on embeddings, ..."""

    short_attention: bool
    """Whether short sequences are attended to in our way: in half precision on a CPU."""


def speed_up(model: nn.Module) -> SpedUp:
    """Let a PEFT model with LoRA train faster, in place, with the same results to rounding.

    Every plain LoRA linear becomes one autograd function, which keeps less for backward and
    computes in the dtype of the activations, under autocast in autocast's; on a CPU, attention over
    short sequences in half precision takes the faster way. Parameters, names and what is saved stay
    PEFT's. It may be called before or after a Trainer is made, and again. For the head and the
    loss there is `use_supervised_loss`.

    Args:
        model: With a LoRA adapter, whose `lora_dropout` is 0.

    Returns:
        What was found to speed up.

    Raises:
        TypeError: There is no LoRA layer that the fused step covers.

    Example:
        >>> config = LoraConfig(r=8, target_modules="all-linear")  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
        >>> speed_up(model)  # doctest: +SKIP
        SpedUp(num_layers=224, num_others=0, short_attention=False)
        >>> Trainer(model, ...).train()  # doctest: +SKIP
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise TypeError(
            f"The {type(model).__name__} has no LoRA layer, so there is nothing to speed up; wrap "
            "it with `peft.get_peft_model(model, LoraConfig(...))` first."
        )
    num_covered = sum(is_covered(layer) for layer in layers)
    if not num_covered:
        raise TypeError(
            f"None of the model's {len(layers)} LoRA layers can be sped up, which plain LoRA on "
            "linear layers can; set `lora_dropout` to 0 and leave variants such as `use_dora` out."
        )
    fuse(model)
    return SpedUp(num_covered, len(layers) - num_covered, _has_short_attention(base_model(model)))


def _has_short_attention(base: nn.Module) -> bool:
    """Give a model of Transformers the short attention, unless it has it or cannot have it."""
    if not isinstance(base, PreTrainedModel):
        return False
    return use_short_attention(base) or base.config._attn_implementation == NAME
