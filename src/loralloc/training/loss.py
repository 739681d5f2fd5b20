"""The loss that a trainer minimises: measured on held-out examples, shown to a method, made faster.

Preferences, rewards, smoothed labels, a `compute_loss` of the user's: importance is measured by
what the trainer minimises, whatever that is.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.layers import base_model
from loralloc.allocation.objective import Batch, Loss, Objective, has_known_loss, is_causal_lm
from loralloc.allocation.supervised import Supervised, SupervisedLoss, supervised_positions
from loralloc.methods.method import Method
from loralloc.training.way_of_running import is_compiled

logger = logging.getLogger(__name__)

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The numbers that Accelerate's mixed precision computes with, by its name for it."""

PLAIN_LOSSES = ("nll", "chunked_nll")
"""TRL's names of the mean cross-entropy: before TRL 1.16 the second is its default."""

GENERATING = (
    *("OnlineDPOTrainer", "PPOTrainer", "AsyncGRPOTrainer", "AsyncDistillationTrainer"),
    *("GRPOTrainer", "RLOOTrainer", "DistillationTrainer"),
)
"""TRL's trainers whose loss is on texts that they generate while they train. Any other that makes
its own inputs is known by its `_prepare_inputs`."""

RUNNING = ("_metrics", "_stored_metrics", "_total_train_tokens", "_logs")
"""Where TRL's trainers add up what they log of the losses they compute."""


def objective(trainer: Trainer, batches: Sequence[Batch] | None) -> Objective:
    """What importance is measured by: the trainer's loss, on these batches.

    The loss is computed once, so that what cannot work is told at the start.

    Args:
        trainer: Its model is the adapted one.
        batches: The scoring batch; None where only losses of other batches are asked for.

    Raises:
        TypeError: The trainer has no loss on held-out examples.
        ValueError: It could not be computed.
    """
    mixed = MIXED.get(trainer.accelerator.mixed_precision)
    found = Objective(trainer.model, batches, loss=own_loss(trainer), mixed=mixed)
    if batches is None:
        return found
    try:
        rounding = found.rounding
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(
            f"The loss of this {type(trainer).__name__} could not be computed on held-out examples "
            f"({type(error).__name__}: {reason}), so that importance cannot be measured; see that "
            'trainer.evaluate() runs, or use `score="sensitivity"`, which needs no such loss.'
        ) from error
    if rounding:
        logger.info("Losses are rounded to %s, too coarse for exact scores of ranks.", rounding)
    return found


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
    if getattr(trainer.args, "loss_type", "nll") not in PLAIN_LOSSES:
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


def mean_loss(trainer: Trainer, method: Method) -> Callable[[Batch], Tensor]:
    """Mean loss of a batch with its graph; the model stays in the mode it is in."""
    model: Any = trainer.model
    supervised = SupervisedLoss(model) if is_causal_lm(model) else None
    # Not every method asks for it, and not every trainer has one.
    own = functools.cache(lambda: objective(trainer, None))

    def loss(batch: Batch) -> Tensor:
        inputs = trainer._prepare_inputs(batch)
        method.watch(inputs)
        if supervised is not None and not own().has_own_loss:
            found = supervised(inputs)
            return found.mean * replicas.weight(found.num_targets)
        num_targets = own().count_targets(inputs)
        return own().loss_sum(inputs) / num_targets * replicas.weight(num_targets)

    return loss


def with_method(trainer: Trainer, method: Method) -> Callable[..., Any] | None:
    """The trainer's `compute_loss`, which shows a method every batch and adds its extra loss.

    The extra loss is added while the model trains, once a step however it is accumulated.

    Returns:
        None where the method neither looks at batches nor adds a loss.
    """
    kind = type(method)
    if kind.watch is Method.watch and kind.extra_loss is Method.extra_loss:
        return None
    own = trainer.compute_loss

    @functools.wraps(own)
    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        method.watch(inputs)
        found = own(model, inputs, return_outputs, num_items_in_batch)
        extra = method.extra_loss() if model.training and not return_outputs else None
        if extra is None:
            return found
        is_whole = _is_of_whole_step(trainer, num_items_in_batch)
        share = trainer.current_gradient_accumulation_steps if is_whole else 1
        return found + extra.to(found) / share

    return compute_loss


def _is_of_whole_step(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether Trainer takes a batch's loss for its share of the step's; else it divides it."""
    told: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return told
    is_by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return is_by_model or trainer.compute_loss_func is not None


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
    if not (_is_the_models(trainer) and has_known_loss(model)):
        raise ValueError(
            "The trainer or its model has a loss of its own (`compute_loss_func`, "
            "`label_smoothing_factor`, `loss_type`, or a method of its class), which the "
            "cross-entropy would replace; leave it out or do without use_supervised_loss()."
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
