"""Ending a run whose weights are no numbers any more, while its last good checkpoint is there."""

from __future__ import annotations

import torch
from torch import nn


def check_finite(model: nn.Module, *, step: int) -> None:
    """Refuse to go on with weights that are not finite.

    Transformers leaves losses that are not finite out of its logs, so that nothing else would tell.
    The host waits for the device once.

    Args:
        model: The model in training.
        step: Optimiser steps so far, for the message.

    Raises:
        FloatingPointError: A weight that trains is NaN or infinite.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        return
    largest = torch.stack([w.abs().amax().float() for w in weights.values() if w.numel()])
    if bool(largest.isfinite().all()):  # NaN is the largest of whatever it stands among
        return
    first = next(name for name, w in weights.items() if not bool(w.isfinite().all()))
    raise FloatingPointError(
        f"At step {step} the weights that train are not finite any more, beginning with {first}: "
        "the run has diverged, and nothing of this step was saved; lower the learning rate or "
        "check the data, and go on from a checkpoint before."
    )
