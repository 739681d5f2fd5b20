"""When the rounds take place: from epochs to optimiser steps."""

from __future__ import annotations

import math

from loralloc.allocation.config import AllocationConfig


def steps_per_epoch(
    num_examples: int, *, batch_size: int, accumulation_steps: int = 1, num_processes: int = 1
) -> int:
    """Optimiser steps of one epoch, counted as `transformers.Trainer` counts them."""
    num_batches = math.ceil(num_examples / (batch_size * num_processes))
    return max(math.ceil(num_batches / accumulation_steps), 1)


def round_steps(config: AllocationConfig, *, steps_per_epoch: int, max_steps: int) -> list[int]:
    """Optimiser steps after which a round takes place, in order.

    Round k of N_A comes after K1 + (k - 1) * K2 epochs (Liu et al. 2024, Algorithm 1).

    Args:
        config: Its `num_rounds`, `warmup_epochs` and `recovery_epochs` are read.
        steps_per_epoch: Optimiser steps of one epoch.
        max_steps: Optimiser steps of the whole run.

    Raises:
        ValueError: A round would come at or after the last step, where the ranks it gives could
            not train, or two rounds would fall on one step.
    """
    epochs = [config.warmup_epochs + config.recovery_epochs * k for k in range(config.num_rounds)]
    steps = [max(1, round(epoch * steps_per_epoch)) for epoch in epochs]
    fitting = sum(step < max_steps for step in steps)
    if fitting < len(steps):
        how_many = "no round" if fitting == 0 else f"only {fitting} of {len(steps)} rounds"
        raise ValueError(
            f"The run has {max_steps} steps of {steps_per_epoch} an epoch, but the last round of "
            f"allocation falls on step {steps[-1]}, so {how_many} could take place before the last "
            f"step; train for more than {epochs[-1]:g} epochs, or lower `num_rounds`, "
            "`warmup_epochs` or `recovery_epochs`."
        )
    if len(set(steps)) < len(steps):
        raise ValueError(
            f"With {steps_per_epoch} steps an epoch, `recovery_epochs` of "
            f"{config.recovery_epochs:g} is less than one optimiser step, so two rounds would "
            f"fall on one step; use at least {1 / steps_per_epoch:.3g}."
        )
    return steps
