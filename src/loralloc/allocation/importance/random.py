"""A control: every rank draws its importance anew at each round, whatever it does for the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.policy import Plan, Scores

ROUNDS = "rounds"
"""Names the number of rounds so far in what is saved."""


class Random(Tracker):
    """Importance is uniform on [0, 1), by the seed and the number of the round alone.

    What is pruned and who receives is then drawn, round after round, as often as the score of a run
    decides it: the difference between the two runs is what the score is worth.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        adapter_name: PEFT's name of the adapter.
        seed: Of the draws; 0 where it is None.
    """

    def __init__(
        self, model: nn.Module, *, adapter_name: str = "default", seed: int | None = None
    ) -> None:
        self._model, self._adapter_name, self._seed = model, adapter_name, seed or 0
        self._num_rounds = 0

    def score(self) -> Scores:
        """See `Tracker.score`: one term, "draw"."""
        # Not the seed of the rows that the round adds: the two would draw the same numbers.
        generator = torch.Generator().manual_seed((self._seed + 1) * 1_000_003 + self._num_rounds)
        now = ranks(lora_layers(self._model, self._adapter_name), self._adapter_name)
        draws = {
            name: torch.rand(rank, generator=generator, device="cpu") for name, rank in now.items()
        }
        return Scores(terms={"draw": draws}, settled=False)

    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """See `Tracker.follow`."""
        self._num_rounds += 1

    def finish(self) -> None:
        """See `Tracker.finish`: nothing was put into the model."""

    def state(self) -> dict[str, Tensor]:
        """See `Tracker.state`."""
        return {ROUNDS: torch.tensor(self._num_rounds, device="cpu")}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Tracker.load_state`.

        Raises:
            ValueError: It is of another score.
        """
        if ROUNDS not in state:
            raise ValueError(
                f"What was saved of the score ({', '.join(state) or 'nothing'}) is not of "
                "'random'; resume with the score that the run was begun with."
            )
        self._num_rounds = int(state[ROUNDS])
