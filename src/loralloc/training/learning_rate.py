"""The learning rate of a run that searches first and trains what it found afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer


def restart_schedule(trainer: Trainer, *, at: int) -> Callable[..., Any]:
    """The learning rate's schedule, warm-up and all, once before a step and once after.

    Returns:
        What is to take the place of the trainer's `create_scheduler`.

    Raises:
        ValueError: The schedule depends on more than the number of the step.
    """
    own = trainer.create_scheduler
    if trainer.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"`lr_scheduler_type` is {trainer.args.lr_scheduler_type.value!r}, which cannot begin "
            "anew where a search ends; use one that follows the steps alone, such as 'linear'."
        )

    @functools.wraps(own)
    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if trainer.lr_scheduler is not None:
            return trainer.lr_scheduler
        parts = []
        for steps in (at, num_training_steps - at):
            schedule: Any = own(steps, optimizer)
            parts.append(schedule.lr_lambdas)
            trainer.lr_scheduler = None
        joined: list[Any] = [
            functools.partial(_in_two, first, second, at)
            for first, second in zip(*parts, strict=True)
        ]
        trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, joined)
        return trainer.lr_scheduler

    return create_scheduler


def _in_two(first: Any, second: Any, at: int, step: int) -> float:
    factor: float = first(step) if step < at else second(step - at)
    return factor
