"""The supervised-position loss for any `Trainer`, from one line."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer

from loralloc.allocation.layers import base_model
from loralloc.allocation.objective import is_causal_lm
from loralloc.allocation.supervised import IGNORED, SupervisedLoss


def use_supervised_loss(trainer: Trainer) -> None:
    """Let a trainer of a causal language model run the head where there is loss, and only there.

    A plain `Trainer` computes the logits of every position, and copies them to float32. With
    prompts masked out of the labels, most are never looked at. The loss and its gradients are
    those of the model, to rounding; memory for logits is bounded. Where a caller asks for the
    outputs (`compute_metrics`, `return_outputs=True`), the trainer's own way is taken.

    Args:
        trainer: A `transformers.Trainer` whose batches have `labels`. TRL's `SFTTrainer` has a
            supervised-position loss of its own, and so have the runs of `loralloc train`.

    Raises:
        TypeError: The model is not a causal language model.
        ValueError: The trainer's loss is another one, so this one could not take effect.

    Example:
        >>> trainer = Trainer(model, ...)  # doctest: +SKIP
        >>> use_supervised_loss(trainer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    model = trainer.model
    if not is_causal_lm(model):
        raise TypeError(
            f"The trainer's model is a {type(base_model(model)).__name__}; a loss at supervised "
            "positions is defined for causal language models only."
        )
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ValueError(
            "The trainer has `compute_loss_func` or `label_smoothing_factor`, a loss of its own; "
            "leave it out or do without use_supervised_loss()."
        )
    loss, own = SupervisedLoss(model), trainer.compute_loss

    @functools.wraps(own)
    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        has_targets = "labels" in inputs and bool((inputs["labels"][:, 1:] != IGNORED).any())
        if return_outputs or not has_targets:
            return own(model, inputs, return_outputs, num_items_in_batch)
        found = loss(inputs, through=model)
        if num_items_in_batch is None:
            return found.total / found.num_targets
        # Targets are counted over all processes, whose gradients are then averaged.
        processes = trainer.accelerator.num_processes
        scale = processes if trainer.args.average_tokens_across_devices else 1
        return found.total * scale / torch.as_tensor(num_items_in_batch).clamp(min=1)

    trainer.compute_loss = compute_loss
