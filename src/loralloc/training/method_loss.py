"""The loss that a trainer trains with, as a method sees it and adds to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer

from loralloc.allocation.objective import Batch, is_causal_lm
from loralloc.allocation.supervised import SupervisedLoss
from loralloc.methods.method import Method
from loralloc.training import scoring_batch


def mean_loss(trainer: Trainer, method: Method) -> Callable[[Batch], Tensor]:
    """Mean loss of a batch with its graph; the model stays in the mode it is in."""
    model: Any = trainer.model
    supervised = SupervisedLoss(model) if is_causal_lm(model) else None
    # Not every method asks for it, and not every trainer has one.
    objective = functools.cache(lambda: scoring_batch.objective(trainer, None))

    def loss(batch: Batch) -> Tensor:
        inputs = trainer._prepare_inputs(batch)
        method.watch(inputs)
        if supervised is not None and not objective().has_own_loss:
            return supervised(inputs).mean
        return objective().loss_sum(inputs) / objective().count_targets(inputs)

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
        # Trainer divides by the micro-batches of a step only what is not yet over all its items.
        is_whole = num_items_in_batch is not None and trainer.model_accepts_loss_kwargs
        share = trainer.current_gradient_accumulation_steps if is_whole else 1
        return found + extra.to(found) / share

    return compute_loss
