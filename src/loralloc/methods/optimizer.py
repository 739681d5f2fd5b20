"""The run's optimiser, where a search changes what there is to train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def train_what_is_left(
    optimizer: Optimizer, model: nn.Module, *, anew: Iterable[nn.Parameter] = ()
) -> None:
    """Take parameters that have left a model out of its optimiser.

    Those that stay keep their groups and their order, by which a resumed run finds their state.

    Args:
        optimizer: Trains the model.
        model: The model as it is now.
        anew: Parameters whose values were drawn anew, so that their state says nothing of them.
    """
    there = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) in there]
    kept = there - {id(parameter) for parameter in anew}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]
