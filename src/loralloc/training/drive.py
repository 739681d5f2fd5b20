"""Driving a method inside any `transformers.Trainer`, so that a user can forget nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralloc.allocation.objective import is_causal_lm
from loralloc.allocation.supervised import SupervisedLoss
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import Batch, Method, Session
from loralloc.training import scoring_batch
from loralloc.training.attach import planned_steps
from loralloc.training.checkpoint import read_state, write_state
from loralloc.training.eligibility import begin_counting, leave_uncounted
from loralloc.training.halves import second_half
from loralloc.training.learning_rate import restart_schedule

STATE_NAME = "method_state"
"""Names the two files of a checkpoint that hold what resuming needs of a method."""

SCORING_EXAMPLES = 32
"""Development examples that a search measures on, as the paper's B_val."""


def drive(trainer: Trainer, method: Method) -> MethodCallback:
    """Let a trainer train with a method: its losses, its steps, its checkpoints.

    Args:
        trainer: Its model is the one that the method prepared.
        method: Prepared.

    Returns:
        The callback, which the trainer has already.

    Raises:
        TypeError: The method acts between steps, and there are several processes or devices, or
            the loss is scaled.
        ValueError: The learning rate's schedule cannot begin anew after a search.
    """
    _check_way_of_running(trainer, method)
    _join_loss(trainer, method)
    _join_saving(trainer, method)
    _join_loading(trainer, method)
    steps_per_epoch, num_steps = planned_steps(trainer)
    known: dict[str, Any] = {
        "num_steps": num_steps,
        "steps_per_epoch": steps_per_epoch,
        "loss": _mean_loss(trainer, method),
        "seed": trainer.args.seed,
    }
    search = method.search_steps(num_steps)
    if search:
        known |= _what_a_search_reads(trainer, search)
        restart_schedule(trainer, at=search)
    callback = MethodCallback(trainer, method, functools.partial(Session, **known))
    trainer.add_callback(callback)
    return callback


class MethodCallback(TrainerCallback):
    """Tells a method where its run is, and keeps checkpoints before its budget from being chosen.

    Made by `drive`.
    """

    def __init__(self, trainer: Trainer, method: Method, session: Callable[..., Session]) -> None:
        """Hold what the method is to be given, but for the optimiser, which is not there yet."""
        self._trainer = trainer
        self._method = method
        self._session = session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the method its session."""
        optimizer = kwargs["optimizer"]
        # Accelerate's wrapper holds the one whose groups and state a method may have to mend.
        self._method.begin(self._session(optimizer=getattr(optimizer, "optimizer", optimizer)))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the method act while the step's gradients are still there."""
        self._method.step(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget the best checkpoint of the time before the method's budget was reached."""
        if state.global_step == self._method.first_eligible_step():
            begin_counting(self._trainer, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep early stopping off until then."""
        if state.global_step < self._method.first_eligible_step():
            leave_uncounted(self._trainer, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the method end, or say that it did nothing."""
        self._method.finish()


def _check_way_of_running(trainer: Trainer, method: Method) -> None:
    kind = type(method)
    acts = kind.step is not Method.step or kind.extra_loss is not Method.extra_loss
    if isinstance(method, InPlaceMethod) and trainer.args.n_gpu > 1:
        raise TypeError(
            f"There are {trainer.args.n_gpu} GPUs, between which one process would copy the model "
            f"without the hooks of {method.about.name}; make a single GPU visible with "
            "CUDA_VISIBLE_DEVICES."
        )
    count = max(trainer.args.world_size, trainer.args.n_gpu)
    if acts and count > 1:
        raise TypeError(
            f"The run has {count} processes or GPUs, and {method.about.name} acts between steps, "
            "which takes place in one process on one device so far: make a single GPU visible with "
            "CUDA_VISIBLE_DEVICES and start one process."
        )
    if acts and trainer.args.fp16:
        raise TypeError(
            f"The run is in fp16, whose loss is scaled and whose steps may be skipped, and "
            f"{method.about.name} reads gradients between steps; train with bf16 or in float32."
        )


def _what_a_search_reads(trainer: Trainer, search: int) -> dict[str, Any]:
    """The other half of the training examples, and held-out ones to measure on."""
    seed, held_out = trainer.args.seed, trainer.eval_dataset
    count = SCORING_EXAMPLES if held_out is None else min(SCORING_EXAMPLES, len(held_out))
    return {
        "second_half": second_half(trainer, until_step=search, seed=seed),
        "held_out": scoring_batch.draw(trainer, held_out, num_examples=count, seed=seed),
    }


def _mean_loss(trainer: Trainer, method: Method) -> Callable[[Batch], Tensor]:
    """Mean loss of a batch with its graph; the model stays in the mode it is in."""
    model: Any = trainer.model
    supervised = SupervisedLoss(model) if is_causal_lm(model) else None

    def loss(batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        method.watch(inputs)
        if supervised is not None:
            found = supervised(inputs)
            return found.total / found.num_targets
        mean: Tensor = model(**inputs).loss
        return mean

    return loss


def _join_loss(trainer: Trainer, method: Method) -> None:
    """Show the method every batch, and add its extra loss while the model trains."""
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

    trainer.compute_loss = compute_loss


def _join_saving(trainer: Trainer, method: Method) -> None:
    """Save through the method, with what a resumed run needs."""

    def save(output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        method.save(folder)
        write_state(folder, STATE_NAME, method.state())
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)

    trainer._save = save


def _join_loading(trainer: Trainer, method: Method) -> None:
    """Load through the method: when resumed, and where the best checkpoint is taken up."""

    def load(checkpoint: str, model: Any = None) -> None:
        method.load(Path(checkpoint))
        method.load_state(read_state(Path(checkpoint), STATE_NAME))

    def load_best() -> None:
        best: str | None = trainer.state.best_model_checkpoint
        assert best is not None
        method.load(Path(best))

    trainer._load_from_checkpoint = load
    trainer._load_best_model = load_best
