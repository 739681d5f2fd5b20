"""Importance that is gathered while the adapter trains, in the place of a scoring batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.policy import Plan, Scores


class Tracker(ABC):
    """A score that is gathered while the adapter trains; one of your own is a subclass.

    It takes part in every optimiser step until the last round, and follows every resize.
    """

    objective: Objective
    """What the run minimises (`objective.loss_sum(batch)`); set before the first step."""

    def learn(self, batches: Iterable[Batch]) -> None:  # noqa: B027 - one of the two is enough
        """Before a step: learn from batches that the weights are not trained on."""

    def observe(self) -> None:  # noqa: B027
        """After the optimiser's step, while the step's gradients are still there."""

    @abstractmethod
    def score(self) -> Scores:
        """Importance of every rank now.

        Raises:
            RuntimeError: Nothing was gathered.
        """

    @abstractmethod
    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """Take a round's plan over, once the model has been resized: new ranks start from nothing.

        Args:
            plan: What was done.
            optimizer: The optimiser that trains the adapter.
        """

    @abstractmethod
    def finish(self) -> None:
        """Leave the model without this, computing what it computed with it."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: It is not of a model with these ranks.
        """
