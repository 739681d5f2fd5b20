"""What a run takes: seconds that survive an interruption, and the peak of its memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.experiments.files import read_json, write_json
from loralloc.runs.machine import process_peak_bytes

NAME = "seconds.json"
"""In a checkpoint: the seconds trained before it."""


class Clock(TrainerCallback):
    """Counts the seconds of training, over all interruptions."""

    def __init__(self, checkpoint: Path | None) -> None:
        """Go on from what a checkpoint had taken."""
        found = read_json(checkpoint / NAME) if checkpoint else {"seconds": 0.0}
        self._before: float | None = found["seconds"] if found else None
        self._begin = self._end = 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds of training; None where an interruption cut a checkpoint's count off."""
        return None if self._before is None else self._before + self._end - self._begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin to count."""
        self._begin = self._end = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the count into the checkpoint."""
        self._end = time.perf_counter()
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_json(folder / NAME, {"seconds": self.seconds})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop counting."""
        self._end = time.perf_counter()


def reset_peak() -> None:
    """Let the accelerator count its peak anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(*, alone: bool) -> int | None:
    """The most memory that was held: the accelerator's, or this process's.

    Args:
        alone: Whether the process has run nothing else.

    Returns:
        None where it cannot be told.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return process_peak_bytes() if alone else None
