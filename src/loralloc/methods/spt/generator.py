"""What makes prompts from pooled hidden states, as in late prompt tuning (Liu et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PromptGenerator(nn.Module):
    """W_up relu(W_down h): what is read at a few positions, as prompts.

    Weights are float32, and computed with in the type of what is read.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.empty(width, bottleneck))
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the weights as PyTorch's linear layers do, from the global generator.

        W_up is not 0 at the start: prompts of 0 have gradients that grow by 1 / sqrt(eps) in every
        norm they reach.
        """
        for weight in (self.down, self.up):
            weight.copy_(nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5))

    def forward(self, pooled: Tensor) -> Tensor:
        """Prompts of shape (..., num_slots, width) from hidden states of that shape."""
        inner = functional.relu(functional.linear(pooled, self.down.to(pooled.dtype)))
        return functional.linear(inner, self.up.to(inner.dtype))


def mix(generator: PromptGenerator, gate: Tensor | None, slots: Tensor, pooled: Tensor) -> Tensor:
    """(1 - gate) p_{i-1} + gate P_i; without a gate, P_i."""
    made: Tensor = generator(pooled)
    return made if gate is None else slots + gate.to(made) * (made - slots)
