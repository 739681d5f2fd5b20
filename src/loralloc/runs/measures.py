"""By what a run compares its evaluations, and the schedule of its learning rate: told at the start.

Trainer finds out at the first evaluation that nothing computes a measure, and when training begins
that a schedule or an optimiser cannot be made as it was asked for.
"""

from __future__ import annotations

import torch
from transformers import Trainer, get_scheduler

from loralloc.runs.heads.head import Head
from loralloc.runs.settings import Settings

LOSS = "loss"
PREFIX = "eval_"
"""What Trainer's names of measures may begin with."""

COMPARING = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the evaluations."""


def check_measure(settings: Settings, head: Head) -> None:
    """Refuse a measure that this run's evaluations do not give, or compare the wrong way round.

    Raises:
        ValueError: Naming the measures that there are.
    """
    args = settings.training
    compares = args.load_best_model_at_end or args.save_strategy == "best"
    if not compares and args.lr_scheduler_type not in COMPARING:
        return
    name = (args.metric_for_best_model or LOSS).removeprefix(PREFIX)
    measures = {LOSS: False} if args.prediction_loss_only else head.measures
    if name not in measures:
        only = " with `prediction_loss_only`" if args.prediction_loss_only else ""
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, which no evaluation of "
            f"the {head.name} head computes{only}; use {' or '.join(measures)}."
        )
    if settings.gives("greater_is_better") and args.greater_is_better != measures[name]:
        way = "greater" if measures[name] else "smaller"
        raise ValueError(
            f"`greater_is_better` is {args.greater_is_better}, but a {way} `{name}` is better; "
            "leave it out."
        )
    _check_evaluations(settings)


def check_optimizer(settings: Settings) -> None:
    """Refuse an optimiser and a schedule of the learning rate that cannot be made.

    Raises:
        ValueError: Naming the options, with the reason.
    """
    args = settings.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`optim` {args.optim.value!r} cannot be made with `optim_args` {args.optim_args!r}: "
            f"{_reason(error)}."
        ) from error
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=dummy,
            num_warmup_steps=1,
            num_training_steps=max(args.max_steps, 2),
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`lr_scheduler_type` {args.lr_scheduler_type.value!r} cannot be made with "
            f"`lr_scheduler_kwargs` {args.lr_scheduler_kwargs!r}: {_reason(error)}."
        ) from error


def _check_evaluations(settings: Settings) -> None:
    """Refuse evaluations that all come too late to choose by."""
    args = settings.training
    unit, ends = "steps", float("inf")  # known without the data only where they are given
    if args.eval_strategy == "steps" and args.max_steps > 0:
        ends = args.max_steps
    elif args.eval_strategy == "epoch" and args.max_steps <= 0:
        unit, ends = "epochs", args.num_train_epochs
    if args.eval_delay > ends:
        raise ValueError(
            f"`eval_delay` is {args.eval_delay:g}, and the run ends after {ends:g} {unit}, so that "
            "no evaluation takes place to choose by; lower it."
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
