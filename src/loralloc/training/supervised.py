"""The supervised-position loss for any `Trainer`, from one line."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from loralloc.allocation.layers import base_model
from loralloc.allocation.objective import is_causal_lm
from loralloc.allocation.supervised import Supervised, SupervisedLoss, supervised_positions
from loralloc.training.compiled import is_compiled


def use_supervised_loss(trainer: Trainer) -> None:
    """Let a trainer of a causal language model run the head where there is loss, and only there.

    A plain `Trainer` computes the logits of every position, and copies them to float32. With
    prompts masked out of the labels, most are never looked at. The loss and its gradients are
    those of the model, to rounding, a mixture's router loss included; memory for logits is
    bounded. Where a caller asks for the outputs (`compute_metrics`, `return_outputs=True`), the
    trainer's own way is taken.

    Args:
        trainer: A `transformers.Trainer` whose batches have `labels`. TRL's `SFTTrainer` has a
            supervised-position loss of its own, and so have the runs of `loralloc train`.

    Raises:
        TypeError: The model is not a causal language model, or it is compiled.
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
    if is_compiled(trainer):
        raise TypeError(
            "The trainer's model is compiled, head and all, and a loss at supervised positions "
            "calls the head by itself; leave `torch_compile` out or do without "
            "use_supervised_loss()."
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
        if return_outputs or "labels" not in inputs:
            return own(model, inputs, return_outputs, num_items_in_batch)
        positions = supervised_positions(inputs["labels"])
        if not len(positions):
            return own(model, inputs, return_outputs, num_items_in_batch)
        found = loss(inputs, positions=positions, through=model)
        return loss_of_step(trainer, found, num_items_in_batch)

    trainer.compute_loss = compute_loss


def loss_of_step(trainer: Trainer, found: Supervised, num_items_in_batch: Any) -> Tensor:
    """What a trainer's `compute_loss` returns of a batch, so that a step has the right gradients.

    Args:
        trainer: Whose step it is.
        found: The loss of the batch.
        num_items_in_batch: The targets of all batches of the step, which the trainer counts over
            all processes; None where it takes the mean of each batch.
    """
    if num_items_in_batch is None:
        return found.mean
    loss = found.total / torch.as_tensor(num_items_in_batch).clamp(min=1)
    if found.router is not None:
        loss = loss + found.router
    if not trainer.args.average_tokens_across_devices:
        return loss
    # Gradients are averaged over the processes, whose targets are in the count already.
    replicas = trainer.accelerator.num_processes // trainer.get_tp_size()
    return loss * int(replicas if trainer.args.n_gpu <= 1 else trainer.args.n_gpu)
