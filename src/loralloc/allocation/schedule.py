"""The steps that the rounds of an allocation come to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loralloc.allocation.config import AllocationConfig

FIRST, LAST = 0.1, 0.6
"""Shares of a run between which rounds are spread where it is too short for the paper's places: the
adapter has learned something before it is measured, and new ranks have time to learn after."""

MIN_GAP = 4
"""Fewest steps between two rounds that are spread. Chosen, not measured: a new rank's column of B
begins at zero, where its importance is zero too, so that a round right after would take it away."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where the rounds of a run take place."""

    steps: tuple[int, ...]
    """Optimiser steps after which a round takes place, ascending."""

    note: str = ""
    """What was done otherwise than the options say, and why; empty where nothing was."""


def steps_per_epoch(
    num_examples: int, *, batch_size: int, accumulation_steps: int = 1, num_processes: int = 1
) -> int:
    """Optimiser steps of one epoch, counted as `transformers.Trainer` counts them."""
    num_batches = math.ceil(num_examples / (batch_size * num_processes))
    return max(math.ceil(num_batches / accumulation_steps), 1)


def place_rounds(config: AllocationConfig, *, steps_per_epoch: int, max_steps: int) -> Schedule:
    """Choose the steps of all rounds.

    Round k of N_A comes after K1 + (k - 1) K2 epochs (Liu et al. 2024, Algorithm 1), if all of them
    then come before the last step, where the ranks that a round gives can still train, and no two
    on one step. In a shorter run up to N_A rounds ("at most" is the paper's own word) are spread
    evenly from 10% to 60% of its steps. Places given by `rounds_at` are never moved.

    Args:
        config: Its `num_rounds`, `warmup_epochs`, `recovery_epochs` and `rounds_at` are read.
        steps_per_epoch: Optimiser steps of one epoch.
        max_steps: Optimiser steps of the whole run.

    Raises:
        ValueError: The run has no step before its last one, or a place of `rounds_at` does not fit.
    """
    if max_steps < 2:
        raise ValueError(
            f"The run has {max_steps} step, and a round of allocation takes place before the last "
            "one; train for 2 steps or more."
        )
    if config.rounds_at is not None:
        return Schedule(steps=_given(config.rounds_at, max_steps))
    epochs = [config.warmup_epochs + config.recovery_epochs * k for k in range(config.num_rounds)]
    steps = tuple(max(1, round(epoch * steps_per_epoch)) for epoch in epochs)
    if steps[-1] >= max_steps:
        need = (
            f"{_rounds(len(steps))} more than {epochs[-1]:g} epochs and the run has "
            f"{max_steps / steps_per_epoch:.3g}"
        )
    elif len(set(steps)) < len(steps):
        need = (
            f"{_rounds(len(steps))} a step each and {config.recovery_epochs:g} epochs of "
            f"{steps_per_epoch} steps are less than one"
        )
    else:
        return Schedule(steps=steps)
    steps = spread(config.num_rounds, max_steps, first=FIRST, last=LAST)
    return Schedule(steps=steps, note=f"{need}: {_where(steps, config.num_rounds)}")


def spread(num_rounds: int, max_steps: int, *, first: float, last: float) -> tuple[int, ...]:
    """Steps of as many rounds as fit, evenly from one share of a run to another.

    Args:
        num_rounds: How many, at most; fewer where they would lie less than `MIN_GAP` steps apart.
        max_steps: Optimiser steps of the run.
        first: Share of the run after which the first one comes.
        last: Share after which no more come.
    """
    begin = max(1, round(first * max_steps))
    room = max(0, math.floor(last * max_steps) - begin)
    gaps = min(num_rounds - 1, room // MIN_GAP)
    # Rounded down, so that no gap is shorter than the room for it.
    return (begin, *(begin + k * room // gaps for k in range(1, gaps + 1)))


def _given(places: tuple[int | float, ...], max_steps: int) -> tuple[int, ...]:
    """Places as steps, each where it was put."""
    steps = tuple(
        place if isinstance(place, int) else max(1, round(place * max_steps)) for place in places
    )
    if steps[-1] >= max_steps:
        raise ValueError(
            f"`rounds_at` ends with {places[-1]}, which is step {steps[-1]}, but the run has "
            f"{max_steps} steps, and a round comes before the last one; name an earlier place or "
            "train for longer."
        )
    for place, step, after, next_step in zip(places, steps, places[1:], steps[1:], strict=False):
        if step == next_step:
            raise ValueError(
                f"`rounds_at` has the places {place} and {after}, which are both step {step} of "
                f"{max_steps}; leave out one of the two."
            )
    return steps


def _rounds(count: int) -> str:
    return "1 round needs" if count == 1 else f"{count} rounds need"


def _where(steps: tuple[int, ...], wanted: int) -> str:
    """Where the rounds are, and whether any is missing."""
    if len(steps) == 1:
        return f"{'it' if wanted == 1 else 'one'} takes place after step {steps[0]}"
    who = "they are" if len(steps) == wanted else f"{len(steps)} of them are"
    return f"{who} spread over steps {steps[0]} to {steps[-1]}"
