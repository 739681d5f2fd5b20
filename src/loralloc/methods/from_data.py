"""LoRA whose ranks and first weights are found on training examples, before the first step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.objective import Batch
from loralloc.allocation.optimizer_state import check_optimizer
from loralloc.methods.peft_method import LoraShaped
from loralloc.methods.session import Session


@dataclass(kw_only=True)
class LoraFromData(LoraShaped):
    """y = W x + s B (A x), plain LoRA once it has begun to train."""

    examples: int = 64
    """Training examples that are looked at, drawn by the seed; all there are where there are
    fewer."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: It would look at nothing.
        """
        if self.examples < 1:
            raise ValueError(f"`examples` is {self.examples}; it must be at least 1.")

    @abstractmethod
    def start(self, session: Session, batches: Sequence[Batch]) -> None:
        """Give the adapter the ranks and the weights that it begins with."""

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """See `Method.check_optimizer`."""
        check_optimizer(optimizer, weights_ab(lora_layers(self.model)))

    def begin(self, session: Session) -> None:
        """See `Method.begin`: a run that goes on has what was found when it began.

        Raises:
            TypeError: Ranks cannot be moved under the optimiser.
        """
        self.check_optimizer(session.optimizer)
        if session.steps_done == 0:
            self.start(session, session.training(self.examples))
