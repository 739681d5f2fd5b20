"""The adapters among which Learned-Adapter searches, all of them at once in one module.

    Ad(y) = W_up op(act(W_down y))

Until one is chosen, act and op are the means of what is left to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralloc.methods.learned_adapter.sequence import WINDOW, Sequences

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}

OPERATIONS = ("identity", "mix", "convolution")
"""What stands between the activation and W_up: nothing, one b x b matrix, or a depthwise
convolution over three tokens."""


class Cell(nn.Module):
    """One adapter and everything that it may become; 0 at the start, for W_up is.

    Weights are float32, and computed with in the type of what is read. `mix` and `convolution` are
    also the names of two operations, and None once these are given up. `leanings`, empty but while
    candidates are scored, move the means: by choice, one number a candidate.

    Args:
        width: Size d of what is read and written.
        bottleneck: Size b between the two products.
        sequences: What is known of the tokens being read, the same for all cells of a model.
    """

    def __init__(self, width: int, bottleneck: int, sequences: Sequences) -> None:
        super().__init__()
        self.activations: Sequence[str] = tuple(ACTIVATIONS)
        self.operations: Sequence[str] = OPERATIONS
        self.leanings: Mapping[str, Tensor] = {}
        self.sequences = sequences
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.empty(width, bottleneck))
        self.mix: nn.Parameter | None = nn.Parameter(torch.empty(bottleneck, bottleneck))
        self.convolution: nn.Parameter | None = nn.Parameter(torch.empty(WINDOW, bottleneck))
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the weights anew, on the CPU, so that every device draws the same."""
        for name, parameter in self.named_parameters():
            values = torch.zeros(parameter.shape)
            # As nn.Linear and nn.Conv1d draw theirs; a channel of a convolution reads `WINDOW`.
            inputs = {"up": 0, "convolution": WINDOW}.get(name, parameter.shape[1])
            if inputs:
                values.uniform_(-(inputs**-0.5), inputs**-0.5)
            parameter.copy_(values)

    def forward(self, y: Tensor) -> Tensor:
        """What is added to a sublayer's output y: (batch, length, width), as y."""
        hidden = _linear(y, self.down)
        activated = [ACTIVATIONS[name](hidden) for name in self.activations]
        hidden = _mean(activated, self.leanings.get("activations"))
        operated = [self._operate(name, hidden) for name in self.operations]
        hidden = _mean(operated, self.leanings.get("operations"))
        return _linear(hidden, self.up)

    def _operate(self, name: str, hidden: Tensor) -> Tensor:
        if name == "identity":
            return hidden
        if name == "mix":
            assert self.mix is not None
            return _linear(hidden, self.mix)
        assert self.convolution is not None
        return self.sequences.convolve(hidden, self.convolution)

    @property
    def is_chosen(self) -> bool:
        """Whether nothing is left to choose."""
        return len(self.activations) == len(self.operations) == 1

    def keep(self, *, activations: Sequence[str], operations: Sequence[str]) -> None:
        """Leave only these to choose from; the weights of the others leave the model."""
        self.activations, self.operations = tuple(activations), tuple(operations)
        for name in ("mix", "convolution"):
            if name not in operations:
                setattr(self, name, None)


def most_parameters(width: int, bottleneck: int) -> int:
    """Those of one adapter with its largest operation."""
    return 2 * width * bottleneck + max(bottleneck, WINDOW) * bottleneck


def _mean(values: Sequence[Tensor], leaning: Tensor | None) -> Tensor:
    """The mean, moved towards each value by what is leant to it."""
    first, *rest = values
    mean = sum(rest, first) / len(values) if rest else first
    if leaning is None:
        return mean
    towards = (e * (value - mean) for e, value in zip(leaning.to(mean), values, strict=True))
    return sum(towards, mean)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))
