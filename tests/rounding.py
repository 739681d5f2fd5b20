"""How far two ways of computing one loss in float32 may lie apart, on whatever processor."""

from torch import nn
from transformers.pytorch_utils import Conv1D

UNIT = 2.0**-24
"""Rounding to float32 changes a number by at most this, relative to it."""


def of_losses(model: nn.Module, *losses: float) -> float:
    """What rounding makes of losses of this size, or of the difference of two.

    From the input to the loss, every number is a sum of as many terms as its layer has inputs, and
    processors sum in different orders. With n the terms of all layers, one after the other, there
    are n roundings, of which as many go up as down: they add up to sqrt(n).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D))]
    num_terms = sum(_num_inputs(layer) for layer in layers)
    return num_terms**0.5 * UNIT * max(1.0, *map(abs, losses))


def _num_inputs(layer: nn.Linear | Conv1D) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
