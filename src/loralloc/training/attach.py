"""Rank allocation inside any `transformers.Trainer`, from one line."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import TRACKED, AllocationConfig
from loralloc.allocation.objective import Batch
from loralloc.allocation.record import FILE_NAME, Record, Round
from loralloc.allocation.schedule import round_steps
from loralloc.methods.restore import check_scaling, restore_shapes
from loralloc.training import scoring_batch
from loralloc.training.eligibility import begin_counting, leave_uncounted
from loralloc.training.halves import second_half

logger = logging.getLogger(__name__)

STATE_NAME = "allocation_state.safetensors"
"""What a score that is gathered while training needs to go on, in checkpoints before the last
round."""


def attach(
    trainer: Trainer,
    config: AllocationConfig | None = None,
    *,
    scoring_dataset: Any = None,
    on_round: Callable[[Round], None] | None = None,
) -> AllocationCallback:
    """Let a trainer's LoRA ranks move between modules while it trains.

    Everything that can be refused is refused here, before the first step. Training that ends, or
    an adapter that is saved, without any round having taken place raises an error.

    Args:
        trainer: A `transformers.Trainer` or a subclass such as TRL's `SFTTrainer`, with a PEFT
            model that has one plain LoRA adapter.
        config: The options; the paper's by default.
        scoring_dataset: Held-out examples as the trainer evaluates on; its `eval_dataset` by
            default. None for a score that is gathered while training.
        on_round: Called with each round once it has taken place.

    Returns:
        The callback, whose `record` holds the rounds.

    Raises:
        ValueError: The options do not fit the model, the data or the length of the run.
        TypeError: The adapter or the way of running has no rank allocation.

    Example:
        >>> trainer = SFTTrainer(model, ..., peft_config=LoraConfig(r=8))  # doctest: +SKIP
        >>> attach(trainer, AllocationConfig(num_rounds=8))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    config = config or AllocationConfig()
    if any(isinstance(c, AllocationCallback) for c in trainer.callback_handler.callbacks):
        raise ValueError("The trainer already has an allocation; attach one configuration once.")
    if config.seed is None:
        config = dataclasses.replace(config, seed=trainer.args.seed)
    callback = AllocationCallback(trainer, config, scoring_dataset, on_round)
    trainer.add_callback(callback)
    return callback


class AllocationCallback(TrainerCallback):
    """Carries out the rounds of an `Allocator` at the steps of its schedule.

    It acts in `on_step_end`: gradients are cleared, the step is counted, and the checkpoint of the
    step is still to come. Made by `attach`.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: AllocationConfig,
        scoring_dataset: Any,
        on_round: Callable[[Round], None] | None,
    ) -> None:
        """Check everything, and take part in the trainer's saving and loading."""
        _check_way_of_running(trainer)
        self._trainer = trainer
        self._config = config
        self._on_round = on_round
        self._is_training = False
        self._batches = self._scoring_batches(scoring_dataset)
        self._allocator = Allocator(trainer.model, config, self._batches)
        self.steps = self._schedule()
        # The last that can be refused: it lets the trainer draw its examples otherwise.
        self._second_half = self._keep_second_half()
        self._join_saving()
        self._join_loading()

    @property
    def record(self) -> Record:
        """The rounds so far."""
        return self._allocator.record

    @property
    def config(self) -> AllocationConfig:
        """The options, with the seed."""
        return self._config

    @property
    def num_pruned(self) -> int:
        """Ranks pruned a round."""
        return self._allocator.num_pruned

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the schedule against the run as it is now, resumed or not."""
        steps = self._schedule()
        if self._second_half and steps != self.steps:
            raise ValueError(
                f"The rounds would come after steps {steps}, but half of the training examples are "
                f"kept for the gates as if after {self.steps}; change the trainer's arguments "
                "before attach()."
            )
        self.steps = steps
        past = sum(step <= state.global_step for step in self.steps)
        if past != len(self.record.rounds):
            raise ValueError(
                f"The run continues at step {state.global_step}, before which {past} rounds of "
                f"allocation are due, but {len(self.record.rounds)} took place; resume from a "
                f"checkpoint that holds {FILE_NAME}, with the options it was begun with."
            )
        self._is_training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let gates learn, where the score is theirs, before the weights do."""
        if self._second_half and self._has_rounds_ahead:
            self._trainer.model.train()
            self._allocator.learn(
                itertools.islice(self._second_half, args.gradient_accumulation_steps)
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the allocator the step's gradients, which are still there."""
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._allocator.observe()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Carry out a round where one is due."""
        if state.global_step not in self.steps:
            return
        entry = self._allocator.step(
            kwargs["optimizer"], step=state.global_step, epoch=float(state.epoch or 0.0)
        )
        begin_counting(self._trainer, state)
        should_log = control.should_log
        self._report(entry)
        control.should_log = should_log  # logging the round is not logging the step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep early stopping off until the last round is over."""
        if self._has_rounds_ahead:
            leave_uncounted(self._trainer, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave plain LoRA, and refuse to end in silence without any round."""
        self._is_training = False
        self._allocator.finish()
        if not self.record.rounds:
            raise RuntimeError(
                f"Training ended at step {state.global_step}, before the first round of "
                f"allocation at step {self.steps[0]}: the adapter is plain LoRA; train longer or "
                "lower `warmup_epochs`."
            )

    @property
    def _has_rounds_ahead(self) -> bool:
        return len(self.record.rounds) < len(self.steps)

    def _scoring_batches(self, scoring_dataset: Any) -> list[Batch]:
        trainer, config = self._trainer, self._config
        if config.score not in TRACKED:
            return scoring_batch.draw(
                trainer,
                trainer.eval_dataset if scoring_dataset is None else scoring_dataset,
                num_examples=config.scoring_examples,
                seed=config.seed or 0,
            )
        if scoring_dataset is not None:
            raise ValueError(
                f"`score` is {config.score!r}, which is gathered while the adapter trains, so that "
                "a `scoring_dataset` would have no effect; leave it out."
            )
        return []

    def _keep_second_half(self) -> Iterator[Batch] | None:
        """Training examples for the gates, where the score is theirs."""
        if self._config.score != "architecture":
            return None
        args = self._trainer.args
        for option in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if (getattr(args, option, None) or {}).get("use_reentrant"):
                raise ValueError(
                    f"`{option}` has `use_reentrant`, under which PyTorch gives no gradient of the "
                    "gates alone; set it to False."
                )
        return second_half(self._trainer, until_step=self.steps[-1], seed=self._config.seed or 0)

    def _schedule(self) -> list[int]:
        steps_per_epoch, max_steps = planned_steps(self._trainer)
        return round_steps(self._config, steps_per_epoch=steps_per_epoch, max_steps=max_steps)

    def _report(self, entry: Round) -> None:
        numbers: dict[str, float] = {
            "round": entry.round,
            "ranks_pruned": sum(map(len, entry.pruned.values())),
            "ranks_given": sum(entry.added.values()),
            "round_seconds": entry.seconds,
        }
        if entry.churn is not None:
            numbers["churn"] = round(entry.churn, 3)
        # Trainer's own log: SFTTrainer's would empty its running metrics into this entry.
        Trainer.log(self._trainer, numbers)
        if self._on_round:
            self._on_round(entry)

    def _join_saving(self) -> None:
        """Put the record beside every saved adapter; refuse to save one that could not change."""
        model = self._trainer.model
        save = model.save_pretrained

        @functools.wraps(save)
        def save_with_record(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
            if not self.record.rounds and not self._is_training:
                raise RuntimeError(
                    "The adapter was to be allocated, but no round has taken place: it is plain "
                    "LoRA; call trainer.train() first."
                )
            result = save(folder, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                self.record.save(folder)
                if self._allocator.is_gathering:
                    save_file(self._allocator.state(), Path(folder) / STATE_NAME)
            return result

        model.save_pretrained = save_with_record

    def _join_loading(self) -> None:
        """Give the model a checkpoint's ranks before the trainer loads its weights."""
        trainer = self._trainer
        load, load_best = trainer._load_from_checkpoint, trainer._load_best_model

        @functools.wraps(load)
        def load_resized(checkpoint: str, *args: Any, **kwargs: Any) -> Any:
            self._restore(checkpoint)
            return load(checkpoint, *args, **kwargs)

        @functools.wraps(load_best)
        def load_best_resized() -> Any:
            best = trainer.state.best_model_checkpoint
            assert best is not None
            restore_shapes(trainer.model, best)
            self._load_state(best)  # of a run that ends before its last round
            return load_best()

        trainer._load_from_checkpoint = load_resized
        trainer._load_best_model = load_best_resized

    def _restore(self, checkpoint: str) -> None:
        record = Record.load(checkpoint)
        model, score = self._trainer.model, self._config.score
        begun = record.config["score"]
        if begun != score and {begun, score} & set(TRACKED):
            raise ValueError(
                f"The run in {checkpoint} was begun with `score` of {begun!r}, and now it is "
                f"{score!r}, of which nothing was gathered so far; resume with the one it was "
                "begun with."
            )
        check_scaling(model, checkpoint)
        self._allocator.finish()
        restore_shapes(model, checkpoint, optimizer=self._trainer.optimizer)
        self._allocator = Allocator(model, self._config, self._batches, record=record)
        self._load_state(checkpoint)

    def _load_state(self, checkpoint: str) -> None:
        """Go on with what was gathered until a checkpoint."""
        if not self._allocator.is_gathering:
            return
        path = Path(checkpoint) / STATE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} holds no {STATE_NAME}, without which `score` of "
                f"{self._config.score!r} cannot go on; resume from another checkpoint."
            )
        self._allocator.load_state(load_file(path))


def planned_steps(trainer: Trainer) -> tuple[int, int]:
    """Optimiser steps of an epoch and of the whole run, as the trainer will count them."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Rounds are placed by epochs, but the training set is a {type(dataset).__name__} "
            "without a length; use a dataset with a length."
        )
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(values[1]), int(values[6])


def _check_way_of_running(trainer: Trainer) -> None:
    """Refuse ways of running in which ranks cannot move."""
    for way, is_on in (
        ("FSDP", trainer.is_fsdp_enabled),
        ("DeepSpeed", trainer.is_deepspeed_enabled),
    ):
        if is_on:
            raise TypeError(
                f"{way} shards the parameters that a round replaces, so ranks cannot be allocated "
                "under it; run in one process."
            )
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise TypeError(
            f"The run has {max(trainer.args.world_size, trainer.args.n_gpu)} processes or GPUs; "
            "rounds take place in one process on one device so far: make a single GPU visible "
            "with CUDA_VISIBLE_DEVICES and start one process."
        )
