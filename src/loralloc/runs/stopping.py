"""Ending a run early where the machine is taken away: after the step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.allocation import replicas


class Stopped(Exception):
    """The run was asked to end, and ended with a whole checkpoint."""

    def __init__(self, step: int) -> None:
        """After so many optimiser steps."""
        super().__init__(f"stopped at step {step}")
        self.step = step


class StopOnSignal(TrainerCallback):
    """Inside `with`, SIGTERM lets a run finish its step, save a checkpoint and raise `Stopped`.

    Schedulers of clusters and clouds send it some seconds before they take a machine away.
    """

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self._is_asked = self._saves_last = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        """Listen for the signal; in the main thread."""
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Let the signal do what it did before."""
        signal.signal(signal.SIGTERM, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint, in all processes where one was asked."""
        self._saves_last = replicas.any_of(self._is_asked)
        control.should_save |= self._saves_last

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the run, now that the checkpoint is there."""
        if self._saves_last:
            raise Stopped(state.global_step)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
