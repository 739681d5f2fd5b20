"""A control: a rank is as important as its part of the update is large, whatever the loss says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import experts_of, lora_layers, weights_ab
from loralloc.allocation.policy import Plan, Scores


class Norm(Tracker):
    """Importance is the Frobenius norm of a rank's update, s |a_i| |b_i|, read off the weights.

    A rank of E experts has an update for each: their norms are put together as one matrix's would
    be.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(self, model: nn.Module, *, adapter_name: str = "default") -> None:
        self._model, self._adapter_name = model, adapter_name

    def score(self) -> Scores:
        """See `Tracker.score`: one term, "norm"."""
        layers = lora_layers(self._model, self._adapter_name)
        experts = experts_of(layers)
        norms = {
            name: norms_of(a.detach(), b.detach(), experts=experts.get(name, 1))
            * layers[name].scaling[self._adapter_name]
            for name, (a, b) in weights_ab(layers, self._adapter_name).items()
        }
        return Scores(terms={"norm": norms}, settled=False)

    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """See `Tracker.follow`: the weights are all there is."""

    def finish(self) -> None:
        """See `Tracker.finish`: nothing was put into the model."""

    def state(self) -> dict[str, Tensor]:
        """See `Tracker.state`."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Tracker.load_state`.

        Raises:
            ValueError: It is of another score.
        """
        if state:
            raise ValueError(
                f"What was saved of the score ({', '.join(state)}) is not of 'norm'; resume with "
                "the score that the run was begun with."
            )


def norms_of(a: Tensor, b: Tensor, *, experts: int = 1) -> Tensor:
    """|b_i a_i^T| of every rank, in float32, shape (num_ranks,).

    Args:
        a: Shape (experts num_ranks, in_features), expert by expert, as PEFT reads it.
        b: Shape (out_features, num_ranks experts), rank by rank.
        experts: How many share the ranks.
    """
    rows: Tensor = a.float().norm(dim=1).view(experts, -1)
    columns: Tensor = b.float().norm(dim=0).view(-1, experts)
    return (rows * columns.T).square().sum(dim=0).sqrt()
