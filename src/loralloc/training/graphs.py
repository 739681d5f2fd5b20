"""A trainer's steps with its model's blocks as CUDA graphs, for models and batches that are small.

A recording is good for one shape of batch. So batches are padded to lengths that are multiples of
`MULTIPLE`, which changes nothing but rounding: it is masked, and no loss is taken on it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from loralloc.allocation.blocks import blocks
from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import IGNORED
from loralloc.kernels.graphs import GraphedBlocks, cuda_graphs
from loralloc.training.dropout import dropout
from loralloc.training.fleet import PADDED_WITH
from loralloc.training.way_of_running import is_compiled

MULTIPLE = 16
"""Tokens that lengths of batches are multiples of: few shapes, and little that is computed in
vain."""

DEVICES = ("cuda",)
"""Kinds of device that can be recorded."""

ROWS_IN_ONE = ("packing", "padding_free")
"""Options with which rows are told apart by their positions, for every batch anew."""


def use_cuda_graphs(trainer: Trainer) -> None:
    """Let the training steps of a small model, or on short batches, wait for no Python.

    PyTorch tells a GPU of each kernel, which takes longer than a small kernel does. Here the blocks
    are recorded once for each shape of batch and replayed. Losses and gradients stay the same, to
    rounding. A recording holds the activations of a batch, so that memory grows with the number of
    shapes; long batches of large models gain nothing.

    Args:
        trainer: Its model is on a GPU.

    Raises:
        TypeError: The model has no list of blocks as Llama, GPT-2 or BERT has.
        ValueError: It could not take effect, or a recording would not be what the model does.

    Example:
        >>> trainer = SFTTrainer(model, ...)  # doctest: +SKIP
        >>> use_cuda_graphs(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    check_graphs(trainer)
    graphs = GraphedBlocks(list(blocks(base_model(trainer.model))), cuda_graphs)
    tokenizer: Any = trainer.processing_class
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    own = trainer.compute_loss

    @functools.wraps(own)
    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return own(model, inputs, return_outputs, num_items_in_batch)
        with graphs.on():
            return own(model, padded(inputs, padding), return_outputs, num_items_in_batch)

    trainer.compute_loss = compute_loss


def check_graphs(trainer: Trainer) -> None:
    """Refuse what a recording would leave out.

    Raises:
        ValueError: As `use_cuda_graphs`.
    """
    args: Any = trainer.args
    reasons = {
        f"the run computes on {args.device.type!r}": args.device.type not in DEVICES,
        "there are several processes": args.world_size > 1,
        "`gradient_checkpointing` computes blocks anew in the backward pass": getattr(
            trainer.model, "is_gradient_checkpointing", False
        )
        or args.gradient_checkpointing,
        "the model is compiled": is_compiled(trainer),
        **{
            f"`{name}` puts several rows into one": getattr(args, name, False)
            for name in ROWS_IN_ONE
        },
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"CUDA graphs cannot be used: {reason}; they are for plain training steps on one "
                "GPU, so leave `cuda_graphs` out."
            )
    for where, option, rate in dropout(base_model(trainer.model)):
        raise ValueError(
            f"CUDA graphs cannot be used: {where or 'the backbone'} has dropout (`{option}` of "
            f"{rate}), whose draw would be the recording's; switch it off in `model_init_kwargs`."
        )


def padded(inputs: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """A batch whose length is a multiple of `MULTIPLE`.

    Args:
        inputs: Of a model, `input_ids` of shape (batch, length) among them.
        padding: Token to fill up with.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not (missing := -ids.shape[1] % MULTIPLE):
        return dict(inputs)
    mask = inputs.get("attention_mask")
    full = {"attention_mask": torch.ones_like(ids)} if mask is None else {}
    values = {**PADDED_WITH, "input_ids": padding, "labels": IGNORED}
    return {
        name: functional.pad(value, (0, missing), value=values[name])
        if name in values and isinstance(value, Tensor) and value.shape == ids.shape
        else value
        for name, value in {**inputs, **full}.items()
    }
