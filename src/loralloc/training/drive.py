"""Driving a method inside any `transformers.Trainer`, so that a user can forget nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralloc.allocation import replicas
from loralloc.allocation.objective import Objective
from loralloc.allocation.record import Round
from loralloc.kernels.quantised import keep_unpacked, train_in_float32
from loralloc.methods.method import Method
from loralloc.methods.session import Session
from loralloc.training.adopt import adopt
from loralloc.training.batches import draw, held_out
from loralloc.training.checkpoint import (
    drawing_nothing,
    read_state,
    stopping_at_the_end,
    write_state,
)
from loralloc.training.eligibility import begin_counting, leave_uncounted
from loralloc.training.finite import check_finite
from loralloc.training.halves import second_half
from loralloc.training.learning_rate import restart_schedule
from loralloc.training.loss import mean_loss, objective, with_method
from loralloc.training.processes import Processes, set_epoch
from loralloc.training.replaced import give_back, replace, replaced
from loralloc.training.saving import refuse_unfinished, saving_with
from loralloc.training.seal import check_whole, newest_whole, sealing
from loralloc.training.undocumented import check_trainer
from loralloc.training.way_of_running import (
    check_checkpointing,
    check_given,
    check_shared_batches,
    check_way_of_running,
    compile_anew,
    planned_length,
)

check_trainer()
logger = logging.getLogger(__name__)

STATE_NAME = "method_state"
"""Names the two files of a checkpoint that hold what resuming needs of a method."""


def drive(
    trainer: Trainer,
    method: Method,
    *,
    scoring_dataset: Any = None,
    on_round: Callable[[Round], None] | None = None,
) -> Driver:
    """Let a trainer train with a method: its losses, its steps, its rounds, its checkpoints.

    What can be refused is refused here, before the first step.

    Args:
        trainer: Its model is the one that the method prepared; or a backbone, which an unprepared
            method adapts here, at the size of LoRA with rank 8 where none was chosen.
        method: How the model is adapted.
        scoring_dataset: Held-out examples as the trainer evaluates on, for a method that measures
            on some; the trainer's `eval_dataset` by default.
        on_round: Called with each round of allocation once it has taken place.

    Returns:
        The driver, which is one of the trainer's callbacks. Its `detach()` gives the trainer and
        the model back as they were.

    Raises:
        ValueError: The method's options do not fit the model, the data or the length of the run.
        TypeError: The model or the way of running does not fit the method.

    Example:
        >>> from loralloc import drive, get_method
        >>> trainer = SFTTrainer(model, ...)  # doctest: +SKIP
        >>> drive(trainer, get_method("sora")(rank=8))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    check_given(trainer, method)
    if any(isinstance(callback, Driver) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "The trainer is driven by a method already; attach or drive one once, or detach() it "
            "first."
        )
    check_way_of_running(trainer, method)
    if method.model is None:
        adopt(trainer, method)
    keep_unpacked(trainer.model)
    if num_cast := train_in_float32(trainer.model, trainer.optimizer):
        logger.info("loralloc: %d LoRA weights in half precision train in float32.", num_cast)
    driver = Driver(trainer, method, scoring_dataset, on_round)
    trainer.add_callback(driver)
    return driver


class Driver(TrainerCallback):
    """Tells a method where its run is, and takes part in the trainer's saving and loading.

    Made by `drive`. While `trainer.train()` runs, the trainer loads checkpoints through the method
    and draws examples and learning rates as it wants; until `detach()`, the method sees every batch
    and what is saved of the model is what the method saves.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: Method,
        scoring_dataset: Any,
        on_round: Callable[[Round], None] | None,
    ) -> None:
        """Check everything, then join."""
        self.method = method
        self._trainer = trainer
        self.notes: list[str] = []
        """What is otherwise than was asked for, a sentence each."""
        self._is_training = False
        self._own_max_steps = trainer.args.max_steps
        self._length = planned_length(trainer)
        self._wants = method.wants(self._length)
        self._session = Session(
            optimizer=trainer.optimizer,
            num_steps=self._length.num_steps + self._wants.on_top,
            search_steps=self._wants.on_top,
            steps_per_epoch=self._length.steps_per_epoch,
            batches_per_step=trainer.args.gradient_accumulation_steps,
            loss=mean_loss(trainer, method),
            training=self._training_examples,
            objective=self._objective(scoring_dataset),
            seed=trainer.args.seed,
            log=self._log,
            on_round=on_round,
        )
        if self._wants.half_until:
            check_checkpointing(trainer)
            check_shared_batches(trainer)
        method.join(self._session)
        self._processes = Processes(trainer, method)
        # From here on the trainer is changed.
        self._while_training = self._joins_of_training()
        self._while_attached = {"train": self._driven(trainer.train)}
        loss = with_method(trainer, method)
        if loss is not None:
            self._while_attached["compute_loss"] = loss
        self._before = replace(trainer, self._while_attached)
        self._model = method.model
        self._save = {"save_pretrained": saving_with(method, self._save_model)}
        self._saved_before = replace(self._model, self._save)

    def detach(self) -> None:
        """Give the trainer and the model back as they were; the method does nothing more.

        LoRA weights that were in half precision stay in float32.
        """
        self._trainer.remove_callback(self)
        self.method.release()
        give_back(self._trainer, self._while_attached, self._before)
        give_back(self._model, self._save, self._saved_before)

    # What the trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method begin, with the run as it is now, resumed or not."""
        with self._own_length():
            self._follow_length()
        self._take_optimizer(kwargs["optimizer"])
        self._session.steps_done = state.global_step
        self.method.begin(self._session)
        self._processes.begin()
        self._is_training = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the sampler, which Trainer does not reach in several processes that go on."""
        set_epoch(kwargs["train_dataloader"], int((state.epoch or 0) + 1e-6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the method act before the batches of the step."""
        self.method.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the method act while the step's gradients are still there."""
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._processes.average()
            self.method.step(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method act between two steps; checkpoints before its budget count no more."""
        number = self._session.steps_done = state.global_step
        if control.should_log or control.should_save or control.should_evaluate:
            check_finite(self._trainer.model, step=number)
        self._take_optimizer(kwargs["optimizer"])
        should_log = control.should_log
        has_changed = self.method.after_step(number, float(state.epoch or 0.0))
        control.should_log = should_log  # logging a round is not logging the step
        self._processes.follow(number, has_changed=has_changed)
        if has_changed:
            compile_anew(self._trainer)
        if has_changed or number == self.method.first_eligible_step():
            begin_counting(self._trainer, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep early stopping off until the method's budget is reached."""
        if state.global_step < self.method.first_eligible_step():
            leave_uncounted(self._trainer, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the method end, or say that it did nothing."""
        self._is_training = False
        check_finite(self._trainer.model, step=state.global_step)
        self._processes.end()
        self.method.finish()

    # What takes the places of the trainer's and the model's own.

    def _driven(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint is True:  # to Trainer the newest, torn or not
                whole = replicas.agreed(newest_whole(self._trainer.args.output_dir))
                resume_from_checkpoint = True if whole is None else str(whole)
            self._follow_length()
            self._own_max_steps = self._trainer.args.max_steps
            if self._wants.on_top:
                self._trainer.args.max_steps = self._session.num_steps
            try:
                with replaced(self._trainer, self._while_training):
                    return own(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._trainer.args.max_steps = self._own_max_steps
                self._is_training = False

        return train

    @contextmanager
    def _own_length(self) -> Iterator[None]:
        """The trainer's arguments as its user has them, without the steps on top."""
        longer = self._trainer.args.max_steps
        self._trainer.args.max_steps = self._own_max_steps
        try:
            yield
        finally:
            self._trainer.args.max_steps = longer

    def _joins_of_training(self) -> dict[str, Any]:
        """Loading, drawing of examples and learning rate, as the method wants them."""
        trainer = self._trainer
        joins: dict[str, Any] = {
            "_load_from_checkpoint": self._load_from_checkpoint,
            "_load_best_model": self._load_best_model,
            "_save_checkpoint": sealing(trainer),
            "_run_epoch": stopping_at_the_end(trainer),
            "evaluate": drawing_nothing(trainer.evaluate),
        }
        if self._wants.half_until:
            self._session.second_half, joins["_get_train_sampler"] = second_half(
                trainer, until_step=self._wants.half_until, seed=self._seed
            )
        if self._wants.restart_at:
            joins["create_scheduler"] = restart_schedule(trainer, at=self._wants.restart_at)
        if type(self.method).arrange is not Method.arrange:
            joins["create_optimizer"] = self._arranged(trainer.create_optimizer)
        return joins

    def _arranged(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Making the optimiser, in the method's groups."""

        @functools.wraps(own)
        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            is_new = self._trainer.optimizer is None
            optimizer = own(*args, **kwargs)
            if is_new:
                self.method.arrange(optimizer)
            return optimizer

        return create_optimizer

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        folder = Path(checkpoint)
        check_whole(folder)
        self._take_optimizer(self._trainer.optimizer)
        self.method.check_saved(folder)
        self._load(folder)

    def _load_best_model(self) -> None:
        best: str | None = self._trainer.state.best_model_checkpoint
        assert best is not None
        self._load(Path(best))

    def _load(self, folder: Path) -> None:
        self.method.load(folder)
        if self._trainer.model is not self.method.model:  # what is around it, now that shapes fit
            type(self._trainer)._load_from_checkpoint(self._trainer, str(folder))
        has_state = (folder / f"{STATE_NAME}.json").is_file()
        if has_state or self.method.needs_state():
            self.method.load_state(read_state(folder, STATE_NAME))

    def _save_model(self, folder: Path, options: dict[str, Any]) -> None:
        if not self._is_training:
            refuse_unfinished(self.method)
        self.method.save(folder, **options)
        is_checkpoint = self._is_training and self.method.needs_state()
        if is_checkpoint and options.get("is_main_process", True):
            write_state(folder, STATE_NAME, self.method.state())

    # What the method is given.

    def _objective(self, dataset: Any) -> Objective | None:
        trainer, count = self._trainer, self._wants.held_out
        if not count:
            if dataset is not None:
                raise ValueError(
                    f"{self.method.about.name} measures on no held-out examples, so that a "
                    "`scoring_dataset` would have no effect; leave it out."
                )
            return objective(trainer, None) if self._wants.half_until else None
        rows = trainer.eval_dataset if dataset is None else dataset
        batches, note = held_out(trainer, rows, num_examples=count, seed=self._seed)
        if note and replicas.is_first():
            logger.warning("loralloc: %s.", note)
            self.notes.append(note)
        return objective(trainer, batches)

    @property
    def _seed(self) -> int:
        return self._trainer.args.seed if self._wants.seed is None else self._wants.seed

    def _training_examples(self, num_examples: int) -> list[Any]:
        trainer, dataset = self._trainer, self._trainer.train_dataset
        number = min(num_examples, len(dataset))  # all there are where there are fewer
        return draw(trainer, dataset, num_examples=number, seed=self._seed)

    def _take_optimizer(self, optimizer: Any) -> None:
        # Accelerate's wrapper holds the one whose groups and state a method may have to mend.
        self._session.optimizer = getattr(optimizer, "optimizer", optimizer)

    def _log(self, numbers: Any) -> None:
        # Trainer's own log: SFTTrainer's would empty its running metrics into this entry.
        Trainer.log(self._trainer, dict(numbers))

    def _follow_length(self) -> None:
        """Place the method's work anew where the trainer's arguments have changed since."""
        length = planned_length(self._trainer)
        if length == self._length:
            return
        wants = self.method.wants(length)
        if (wants.half_until, wants.restart_at) != (
            self._wants.half_until,
            self._wants.restart_at,
        ):
            raise ValueError(
                f"The run has {length.num_steps} steps now and had {self._length.num_steps} when "
                f"half of the training examples were kept for {self.method.about.name}; change the "
                "trainer's arguments before attach()."
            )
        self._length, self._wants = length, wants
        self._session.num_steps = length.num_steps + wants.on_top
        self._session.steps_per_epoch = length.steps_per_epoch


def detach(trainer: Trainer) -> None:
    """Give a trainer and its model back as they were before `drive` or `attach`.

    The adapter stays as it is now. Nothing happens where no method drives the trainer.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, Driver):
            callback.detach()
