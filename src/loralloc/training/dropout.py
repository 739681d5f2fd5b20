"""Where a model drops activations at random."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def dropout(model: nn.Module) -> Iterator[tuple[str, str, float]]:
    """Name of the module, its option and its rate, of all dropout above 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            if module.p:
                yield name, "p", module.p
            continue
        for option, value in vars(module).items():
            if "drop" in option and isinstance(value, float) and value > 0:
                yield name, option, value
