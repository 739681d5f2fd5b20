"""What a run will take, from a few of its own batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import torch

from loralloc.runs.machine import process_peak_bytes
from loralloc.runs.run import Run

MOST_BATCHES = 4
"""Batches that are run, the first of which is not timed."""

MOST_S = 10.0
"""Seconds after which no further batch is begun."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of the training steps alone: no evaluation, round or checkpoint is in it."""

    step_s: float
    """Seconds of an optimiser step, with all the batches that it accumulates."""

    num_timed: int
    """Batches that this was measured on."""

    peak_bytes: int | None
    """Most memory so far, the first batch included, which is the longest where batches hold
    examples of like length: the device's, or on a CPU that of the whole process; None
    where it cannot be told."""


def estimate(run: Run) -> Estimate:
    """Run forward and backward on a few batches of a prepared run; no weight changes.

    The optimiser's state is not there yet, so its memory is not counted.
    """
    trainer, model = run.trainer, run.trainer.model
    assert model is not None
    batches = list(islice(trainer.get_train_dataloader(), MOST_BATCHES))
    model.train()
    seconds: list[float] = []
    begin = time.perf_counter()
    for index, batch in enumerate([batches[0], *(batches[1:] or batches)]):
        if index > 1 and time.perf_counter() - begin > MOST_S:
            break
        start = time.perf_counter()
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            # The class's own: what a method adds to the loss is there once it has begun.
            loss = type(trainer).compute_loss(trainer, model, inputs)
        loss.backward()
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if index:
            seconds.append(time.perf_counter() - start)
    accumulated = trainer.args.gradient_accumulation_steps
    return Estimate(
        step_s=accumulated * sum(seconds) / len(seconds),
        num_timed=len(seconds),
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return process_peak_bytes()
