"""ALoRA-DNAS: a gate on every rank, learned as in DARTS, is its importance.

A gate is g = 2 sigmoid(a') with a' = 0, so g = 1, at the start (Liu et al. 2024, eqs. 4 and 5 and
Appendix F). Bi-level optimisation to first order (Liu et al. 2019, DARTS): before every step of the
weights on one half of the training examples, a' takes one of its own on the other half. At a round
the gates go into B and begin anew from 1, so that the scores of old and new ranks are comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from loralloc.allocation import replicas
from loralloc.allocation.gates import fold_gates, gate_ranks
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import lora_layers, ranks, weights_b
from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.policy import Plan, Scores
from loralloc.allocation.transfers import to_cpu

BETA_1, BETA_2, EPSILON = 0.5, 0.999, 1e-8
"""Of the gates' Adam. Source: DARTS."""

STATE = ("logits", "mean", "square", "count")
"""Of every rank: a', Adam's two moments, and the steps that it took."""

NEW = -1
"""Where a rank was that was not there."""


class Gates(Tracker):
    """The gates of a LoRA adapter; each tensor of their state is of all ranks.

    They live outside the model, which is touched from the first step of theirs on. What is saved
    of it is plain LoRA, and computes what the model does where the gates are 1, as after a round.

    Args:
        model: A PEFT model with a plain LoRA adapter, on its device.
        lr: Learning rate of a'.
        weight_decay: Weight decay of a'.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, adapter_name: str = "default"
    ) -> None:
        self._model, self._adapter_name = model, adapter_name
        self._lr, self._weight_decay = lr, weight_decay
        self.objective = Objective(model, None)
        layers = lora_layers(model, adapter_name)
        self._num_ranks = ranks(layers, adapter_name)
        device = next(iter(weights_b(layers, adapter_name).values())).device
        total = sum(self._num_ranks.values())
        self._state = {key: torch.zeros(total, device=device) for key in STATE}
        self._gates = self._by_module(self._values())
        self._handles: list[RemovableHandle] = []

    def learn(self, batches: Iterable[Batch]) -> None:
        """Take one step of a' on the mean loss over all targets of the batches.

        The model stays in the mode it is in, and its weights without a gradient from this.
        """
        self._put()
        counted = [(batch, self.objective.count_targets(batch)) for batch in batches]
        num_targets = replicas.total(sum(count for _, count in counted))
        logits = self._state["logits"].clone().requires_grad_()
        gradient = torch.zeros_like(logits)
        try:
            for batch in (batch for batch, count in counted if count):
                self._gates = self._by_module(2 * torch.sigmoid(logits))
                loss = self.objective.loss_sum(batch) / num_targets
                gradient += torch.autograd.grad(loss, logits)[0]
            # Each process has its share of the targets.
            self._update(replicas.averaged({"": gradient})[""] * replicas.count())
        finally:
            self._gates = self._by_module(self._values())

    def score(self) -> Scores:
        """See `Tracker.score`: one term, "gate"."""
        if not self._state["count"].any():
            raise RuntimeError(
                "The gates have learned from no batch, so they tell nothing; call `learn` before "
                "every step of the weights."
            )
        return Scores(terms={"gate": to_cpu(self._gates)}, settled=False)

    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """See `Tracker.follow`: the gates go into B, and a' begins anew from 0.

        Its moments stay with the ranks that stay.
        """
        origin: list[int] = []  # of every rank after the round: where it was before
        start = 0
        for name, num_ranks in self._num_ranks.items():
            origin += [start + index for index in plan.kept[name]] + [NEW] * plan.added[name]
            start += num_ranks
        where = torch.tensor(origin, device=self._state["logits"].device)
        self._state = {
            key: torch.where(where == NEW, 0.0, value[where]) for key, value in self._state.items()
        }
        ranks_now = {name: plan.rank_after(name) for name in self._num_ranks}
        self._num_ranks = {name: rank for name, rank in ranks_now.items() if rank}
        self._fold(optimizer)

    def finish(self) -> None:
        """See `Tracker.finish`: the gates go into B."""
        self._fold(None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state(self) -> dict[str, Tensor]:
        """See `Tracker.state`."""
        return {key: value.clone() for key, value in self._state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Tracker.load_state`."""
        now = self._state["logits"]
        for key in STATE:
            if key not in state or state[key].shape != now.shape:
                raise ValueError(
                    f"The gates to go on with are not those of {len(now)} ranks; restore the "
                    "adapter of the same checkpoint first."
                )
        self._state = {key: state[key].to(now.device, copy=True) for key in STATE}
        self._gates = self._by_module(self._values())
        self._put()

    def _put(self) -> None:
        """Let the gates multiply, from now on."""
        if not self._handles:
            self._handles = gate_ranks(
                self._model, lambda name: self._gates[name], self._adapter_name
            )

    def _update(self, gradient: Tensor) -> None:
        """Adam's step of a' (Kingma & Ba 2015), with steps counted rank by rank.

        With one count for all, as `torch.optim.Adam` has it, the moments of a new rank, which
        begin from zero, would be taken for settled, and its gate would move up to
        (1 - b1) / sqrt(1 - b2) = 16 times as far in a step as an old one.
        """
        logits, mean, square, count = (self._state[key] for key in STATE)
        gradient = gradient + self._weight_decay * logits
        count += 1
        mean.lerp_(gradient, 1 - BETA_1)
        square.lerp_(gradient.square(), 1 - BETA_2)
        scale = (square / (1 - BETA_2**count)).sqrt() + EPSILON
        logits -= self._lr * mean / (1 - BETA_1**count) / scale

    def _fold(self, optimizer: Optimizer | None) -> None:
        """Put the gates into B, so that they are 1."""
        fold_gates(
            self._model,
            self._by_module(self._values()),
            optimizer=optimizer,
            adapter_name=self._adapter_name,
        )
        self._state["logits"].zero_()
        self._gates = self._by_module(self._values())

    def _values(self) -> Tensor:
        """The gate of every rank, without a graph."""
        return 2 * torch.sigmoid(self._state["logits"])

    def _by_module(self, values: Tensor) -> dict[str, Tensor]:
        parts = torch.split(values, list(self._num_ranks.values()))
        return dict(zip(self._num_ranks, parts, strict=True))
