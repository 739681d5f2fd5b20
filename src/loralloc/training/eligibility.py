"""Which checkpoints count: none before a method has reached its budget, or its last round."""

from __future__ import annotations

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState


def begin_counting(trainer: Trainer, state: TrainerState) -> None:
    """Let only checkpoints from now on be the best one, and early stopping count from now on.

    Where a run is stopped early, the best checkpoint so has the shapes that the model has then.
    """
    state.best_metric = None
    state.best_model_checkpoint = None
    state.best_global_step = 0
    for callback in _early_stopping(trainer):
        callback.early_stopping_patience_counter = 0


def leave_uncounted(trainer: Trainer, control: TrainerControl) -> None:
    """Let the evaluation that was made stop nothing."""
    for callback in _early_stopping(trainer):
        if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
            control.should_training_stop = False
        # One below zero: a callback that comes after the caller's counts this evaluation too.
        callback.early_stopping_patience_counter = -1


def _early_stopping(trainer: Trainer) -> list[EarlyStoppingCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
