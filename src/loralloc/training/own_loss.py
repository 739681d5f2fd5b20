"""The loss that a trainer computes itself, in the place of the model's.

Preferences, rewards, smoothed labels, a `compute_loss` of the user's: importance is measured by
what the trainer minimises, whatever that is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from loralloc.allocation.objective import Batch, Loss

GENERATING = (
    *("OnlineDPOTrainer", "PPOTrainer", "AsyncGRPOTrainer", "AsyncDistillationTrainer"),
    *("GRPOTrainer", "RLOOTrainer", "DistillationTrainer"),
)
"""TRL's trainers whose loss is on texts that they generate while they train. Any other that makes
its own inputs is known by its `_prepare_inputs`."""

RUNNING = ("_metrics", "_stored_metrics", "_total_train_tokens", "_logs")
"""Where TRL's trainers add up what they log of the losses they compute."""


def own_loss(trainer: Trainer) -> Loss | None:
    """The mean loss of a batch as the trainer computes it; None where it is the model's.

    What the trainer logs stays as it is. A loss that draws random numbers draws the same ones for
    every batch while the model evaluates, so that losses differ by the model alone.

    Raises:
        TypeError: The trainer has no loss on held-out examples.
    """
    kind = type(trainer)
    makes_inputs = kind._prepare_inputs is not Trainer._prepare_inputs
    if makes_inputs or any(base.__name__ in GENERATING for base in kind.__mro__):
        raise TypeError(
            f"The loss of a {kind.__name__} is on examples that it makes while it trains, so that "
            'importance cannot be measured on held-out ones; use `score="sensitivity"`, which is '
            "gathered from the training steps."
        )
    if _is_the_models(trainer):
        return None
    compute_loss = trainer.compute_loss  # as it is now, before a method adds a loss of its own

    def loss(batch: Batch) -> Tensor:
        inputs = trainer._prepare_inputs(copy.copy(batch))  # some trainers take things out of it
        with (
            _logging_nothing(trainer),
            _same_draw(trainer.model),
            trainer.compute_loss_context_manager(),
        ):
            found: Tensor = compute_loss(trainer.model, inputs)
        return found.mean()

    return loss


def _is_the_models(trainer: Trainer) -> bool:
    """Whether the trainer's loss is the cross-entropy, or whatever its model puts out."""
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return False
    if not str(getattr(trainer.args, "loss_type", "nll")).endswith("nll"):
        return False
    compute: Any = trainer.compute_loss
    while _is_ours(compute):
        if not hasattr(compute, "__wrapped__"):
            return True
        compute = compute.__wrapped__
    function = getattr(compute, "__func__", compute)
    is_trls = function.__module__.startswith("trl.") and function.__qualname__.startswith("SFT")
    return function is Trainer.compute_loss or is_trls


def _is_ours(compute: Any) -> bool:
    """Whether a `compute_loss` was written here: a faster way to the same loss."""
    function = getattr(compute, "__func__", compute)
    # Not `__module__`, which a wrapper takes over from what it wraps.
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("loralloc.")


@contextmanager
def _logging_nothing(trainer: Trainer) -> Iterator[None]:
    """What is added up for the log is afterwards what it was before."""
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in RUNNING if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)


@contextmanager
def _same_draw(model: Any) -> Iterator[None]:
    """The same random numbers every time, unless the model trains; the user's are left alone."""
    if model.training:
        yield
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
