"""The paper's protocol of a run: batch and length, evaluation, early stopping, best checkpoint.

Liu et al. 2024, Appendix E. No checkpoint is eligible, and no evaluation counts, before the last
round of allocation is over: `attach` sees to that.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralloc.methods.catalog import get_method
from loralloc.runs.settings import Settings
from loralloc.training.way_of_running import planned_length

SOURCE = "protocol "
"""What the source of a protocol's values begins with; its name follows."""

RECIPE: dict[str, Any] = {
    "num_train_epochs": 10.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "max_length": 2048,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "early_stopping_patience": 10,
}
"""What does not depend on the data; AdamW is the trainer's default. The paper gives one learning
rate to all methods, `tuned` each its own."""

SMALL_BATCH, LARGE_BATCH = 16, 128
"""Examples of an optimiser step, below and from `MANY_EXAMPLES` training examples on."""

MANY_EXAMPLES = 10_000
EVAL_STEPS = 200

SHORT_RUN = 2_000
"""Optimiser steps in all below which a run is evaluated twice an epoch. Not the paper's: at every
200 steps, a run of 250 would be evaluated twice and could never run out of patience."""


def apply(settings: Settings, *, num_examples: int) -> Settings:
    """Fill in a protocol where the settings ask for one, before the trainer is built.

    `paper` is the paper's; `tuned` is the same with the learning rate that the method recommends,
    around which a search for the best has equally many trials for every method
    (`loralloc.methods.catalog.learning_rates`).

    Args:
        settings: As resolved. A value from a flag, a file or an earlier run stays.
        num_examples: Training examples.

    Raises:
        ValueError: A value that was given contradicts the protocol.
    """
    if settings.run.protocol is None:
        return settings
    values = {**RECIPE, **_batch(settings, num_examples), **_evaluation(settings)}
    settings = settings.with_defaults(values, source=SOURCE + settings.run.protocol)
    return _with_own_rate(settings) if settings.run.protocol == "tuned" else settings


def follow(trainer: Trainer, settings: Settings) -> Settings:
    """Let a trainer stop early and keep its best checkpoint, as its settings say.

    A protocol's evaluations are placed here: the trainer alone knows its steps, because examples
    may have been cut into windows.

    Returns:
        The settings that the trainer has now.

    Raises:
        ValueError: Early stopping or the choice of a checkpoint could not take effect.
    """
    if settings.sources.get("eval_steps", "").startswith(SOURCE):
        settings = _more_often_in_a_short_run(trainer, settings)
    _check_choice(settings)
    if settings.training.load_best_model_at_end:
        trainer.add_callback(BestCheckpoint())
    if settings.run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(settings.run.early_stopping_patience))
    return settings


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' early stopping, whose count goes on when a run is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count of the checkpoint, and end at once where it is full."""
        super().on_train_begin(args, state, control, **kwargs)
        # Trainer's own way restores the patience too, over the one that is asked for now.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"][
            "early_stopping_patience_counter"
        ]
        if self._is_over:
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the one step that Trainer takes of a run that is over leave no trace."""
        if self._is_over:
            control.should_evaluate = control.should_save = False

    @property
    def _is_over(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint again when a run is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look where the run folder is now; Trainer would go on without a best one in silence."""
        if not state.best_global_step:
            return
        best = Path(args.output_dir or "") / f"checkpoint-{state.best_global_step}"
        if not best.is_dir():
            raise ValueError(
                f"The best checkpoint so far is {best}, which is not there; put it back, or begin "
                "again with `--overwrite`."
            )
        state.best_model_checkpoint = str(best)


def _with_own_rate(settings: Settings) -> Settings:
    """The learning rate that the method recommends, where none was given."""
    about = get_method(settings.run.method).about
    if not settings.sources["learning_rate"].startswith(SOURCE):
        return settings
    if about.learning_rate is None:
        raise ValueError(
            f"`protocol` is 'tuned', but {about.name} recommends no learning rate; give "
            "`learning_rate`, or use the protocol 'paper'."
        )
    why = f"{SOURCE}tuned: recommended for {about.name} ({about.rate_from})"
    return settings.replaced({"learning_rate": about.learning_rate}, source=why)


def _batch(settings: Settings, num_examples: int) -> dict[str, int]:
    """The paper's batch as examples on the device and accumulation, whichever was not given."""
    if settings.training.packing:
        raise ValueError(
            "`packing` is true, but the paper's protocol counts a batch in examples, which packing "
            "joins; leave out `packing` or `protocol`."
        )
    batch = LARGE_BATCH if num_examples >= MANY_EXAMPLES else SMALL_BATCH
    batch = _of_each_process(batch, settings.training.world_size)
    size, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    if settings.gives(size) == settings.gives(accumulation):
        return {size: batch, accumulation: 1}
    given, other = (size, accumulation) if settings.gives(size) else (accumulation, size)
    value = getattr(settings.training, given)
    if batch % value:
        raise ValueError(
            f"`{given}` is {value}, which does not divide the paper's batch of {batch} for "
            f"{num_examples:,} training examples; give `{other}` too for a batch of your own."
        )
    return {other: batch // value}


def _of_each_process(batch: int, num_processes: int) -> int:
    """A process's share of the paper's batch."""
    if batch % num_processes:
        raise ValueError(
            f"The paper's batch of {batch} examples cannot be divided among {num_processes} "
            "processes; start a number that divides it, or give a batch without `protocol`."
        )
    return batch // num_processes


def _evaluation(settings: Settings) -> dict[str, Any]:
    """A checkpoint with every evaluation."""
    if settings.gives("eval_strategy") and settings.training.eval_strategy != "steps":
        return {"save_strategy": settings.training.eval_strategy.value}
    every = settings.training.eval_steps if settings.gives("eval_steps") else EVAL_STEPS
    steps = {"eval_steps": every, "save_steps": every}
    return {"eval_strategy": "steps", "save_strategy": "steps", **steps}


def _more_often_in_a_short_run(trainer: Trainer, settings: Settings) -> Settings:
    length = planned_length(trainer)
    if length.num_steps >= SHORT_RUN:
        return settings
    every = math.ceil(length.steps_per_epoch / 2)
    source = settings.sources["eval_steps"]
    why = f"{source}: twice an epoch, not every {EVAL_STEPS}: under {SHORT_RUN:,} in all"
    names = [name for name in ("eval_steps", "save_steps") if settings.sources[name] == source]
    for name in names:
        setattr(settings.training, name, every)  # Trainer reads them when training begins
    return dataclasses.replace(
        settings,
        given={**settings.given, **dict.fromkeys(names, every)},
        sources={**settings.sources, **dict.fromkeys(names, why)},
    )


def _check_choice(settings: Settings) -> None:
    """Refuse early stopping and a choice of checkpoint that would not happen."""
    args, patience = settings.training, settings.run.early_stopping_patience
    if patience is not None and patience < 1:
        raise ValueError(f"`early_stopping_patience` is {patience}; it must be at least 1.")
    if patience is not None and not args.load_best_model_at_end:
        raise ValueError(
            f"`early_stopping_patience` is {patience} "
            f"({settings.sources['early_stopping_patience']}), but which evaluation is the best is "
            "known only with `load_best_model_at_end`; set it, or leave out what asks for patience."
        )
    if not args.load_best_model_at_end:
        return
    if args.eval_strategy == "no":
        raise ValueError(
            "`eval_strategy` is 'no', but the best checkpoint (`load_best_model_at_end`: "
            f"{settings.sources['load_best_model_at_end']}) is chosen by evaluations; leave out "
            "one of the two."
        )
    by_steps = args.eval_strategy == args.save_strategy == "steps"
    if by_steps and args.eval_steps != args.save_steps:
        raise ValueError(
            f"`eval_steps` is {args.eval_steps} and `save_steps` {args.save_steps}, but the best "
            "evaluation can be loaded only where it was saved; give both the same value."
        )
