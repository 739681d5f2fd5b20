"""SPT-DARTS: the gates of prompt generators, learned on examples that the weights do not see.

    a_i = sigmoid(alpha_i)        a_i <- a_i sg(sum_j a_j) / sum_j a_j        (sg: no gradient)

which leaves every gate its value, but gives it a gradient only for what it is better than the
others, as not all of them can stay. Their loss is the model's and, weighted, the distance between
the final hidden states of two sub-networks, each without a random half of the gates: a generator
whose presence decides over what the others do is learned in spite of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loralloc.allocation import replicas
from loralloc.allocation.blocks import backbone
from loralloc.allocation.objective import Batch
from loralloc.methods.session import Session

LEARNING_RATE = 1e-2
"""Of Adam on alpha. DARTS's 3e-4 is for tens of thousands of steps, and a search has hundreds."""

BETAS = (0.5, 0.999)
"""DARTS's, of Adam on the architecture's weights."""

DROPPED = 0.5
"""Part of the gates that a sub-network is without."""


class LayerSearch:
    """One gate for every block that prompts may be made before.

    Args:
        candidates: The blocks, in order.
        tau: What every gate is multiplied by.
        consistency: Weight of the sub-networks' distance in the gates' loss.
    """

    def __init__(self, candidates: Sequence[int], *, tau: float, consistency: float) -> None:
        self._candidates = list(candidates)
        self._tau, self._consistency = tau, consistency
        # On the CPU wherever the model is: a few numbers, copied in every pass.
        self.alpha = torch.zeros(len(candidates), requires_grad=True)
        self._optimizer = torch.optim.Adam([self.alpha], lr=LEARNING_RATE, betas=BETAS)
        self._kept: Tensor | None = None

    def gates(self) -> dict[int, Tensor]:
        """For every candidate tau a_i, or 0 where the sub-network of the moment is without it."""
        a = shared_gates(self.alpha) * self._tau
        if self._kept is not None:
            a = a * self._kept
        return dict(zip(self._candidates, a.unbind(), strict=True))

    def update(self, model: Any, session: Session) -> None:
        """Take one step of alpha on the second half; no gradient reaches a weight."""
        gradients: list[Tensor] = []
        for batch in session.of_second_half():
            gradients += torch.autograd.grad(session.loss(batch), self.alpha)
            if self._consistency:
                # By itself: the graphs of two passes are held at once, not those of three.
                first, second = (self._sub_network(model, session, batch) for _ in range(2))
                distance = (first - second).square().mean() * replicas.weight(len(first))
                gradients[-1] += self._consistency * torch.autograd.grad(distance, self.alpha)[0]
        self.alpha.grad = torch.stack(gradients).mean(dim=0)
        replicas.average_gradients([self.alpha])
        self._optimizer.step()
        self.alpha.grad = None

    def best(self, count: int) -> list[int]:
        """The candidates with the largest gates, in order; the earlier of two equals."""
        ranked = torch.argsort(self.alpha.detach(), descending=True, stable=True)
        return sorted(self._candidates[place] for place in ranked[:count].tolist())

    def state(self) -> dict[str, Any]:
        """What a resumed search needs."""
        moments = dict(self._optimizer.state[self.alpha])
        return {"alpha": self.alpha.detach().clone(), "moments": moments}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.alpha.data.copy_(state["alpha"])
        self._optimizer.state[self.alpha] = dict(state["moments"])

    def _sub_network(self, model: Any, session: Session, batch: Batch) -> Tensor:
        """Final hidden states (tokens, width) without the gates that are dropped now."""
        self._kept = (torch.rand(len(self._candidates)) >= DROPPED).float()
        replicas.share([self._kept])
        try:
            with _final_hidden_states(model) as found:
                session.loss(batch)
        finally:
            self._kept = None
        is_text = batch["attention_mask"].bool().to(found[-1].device)
        return found[-1][is_text].float()


def shared_gates(alpha: Tensor) -> Tensor:
    """Sigmoids of alpha, whose gradients are relative to their sum."""
    a = alpha.sigmoid()
    return a * (a.sum().detach() / a.sum())


@contextmanager
def _final_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What leaves the backbone inside, pass by pass."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append(output.last_hidden_state)

    handle = backbone(model).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
