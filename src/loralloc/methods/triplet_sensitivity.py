"""AdaLoRA's sensitivity of triplets: a row of A, a column of B and the factor between them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from loralloc.allocation.importance.sensitivity import Sensitivity


class TripletSensitivity(Sensitivity):
    """As `Sensitivity`, whose gate, always 1, is here a factor e that trains.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        factors: e by module, with the gradients of the step; read at every step.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model)
        self.factors = factors

    def _seen(self) -> dict[tuple[str, str], Tensor]:
        """See `Sensitivity._seen`."""
        seen = super()._seen()
        for name, factor in self.factors.items():
            gradient = factor.grad
            if gradient is not None:
                seen[name, "gate"] = (factor.detach() * gradient).abs()
        return seen
