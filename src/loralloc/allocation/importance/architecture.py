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
from torch.optim import Adam, Optimizer

from loralloc.allocation.gates import fold_gates, gate_ranks
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import lora_layers, ranks, weights_b
from loralloc.allocation.objective import Batch, Objective
from loralloc.allocation.policy import Plan, Scores

BETAS = (0.5, 0.999)
"""Of the gates' Adam. Source: DARTS."""

NEW = -1
"""Where a rank was that was not there."""

LOGITS = "logits"
"""Key of a' in the state; the others are Adam's."""


class Gates(Tracker):
    """The gates of a LoRA adapter, on from the start; a' of all ranks is one vector.

    They live outside the model: what is saved of it is plain LoRA, which computes what the model
    does once the gates are folded, at every round.

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
        self._objective = Objective(model, None)
        layers = lora_layers(model, adapter_name)
        self._num_ranks = ranks(layers, adapter_name)
        device = next(iter(weights_b(layers, adapter_name).values())).device
        self._logits = torch.zeros(sum(self._num_ranks.values()), device=device, requires_grad=True)
        self._optimizer = Adam([self._logits], lr=lr, betas=BETAS, weight_decay=weight_decay)
        self._gates = self._by_module(self._values())
        self._handles = gate_ranks(model, lambda name: self._gates[name], adapter_name)

    def learn(self, batches: Iterable[Batch]) -> None:
        """Take one step of a' on the mean loss over all targets of the batches.

        The model stays in the mode it is in, and its weights without a gradient from this.
        """
        counted = [(batch, self._objective.count_targets(batch)) for batch in batches]
        num_targets = sum(count for _, count in counted)
        gradient = torch.zeros_like(self._logits)
        try:
            for batch in (batch for batch, count in counted if count):
                self._gates = self._by_module(2 * torch.sigmoid(self._logits))
                loss = self._objective.loss_sum(batch) / num_targets
                gradient += torch.autograd.grad(loss, self._logits)[0]
            self._logits.grad = gradient
            self._optimizer.step()
        finally:
            self._gates = self._by_module(self._values())

    def score(self) -> Scores:
        """See `Tracker.score`: one term, "gate"."""
        if not self._optimizer.state:
            raise RuntimeError(
                "The gates have learned from no batch, so they tell nothing; call `learn` before "
                "every step of the weights."
            )
        return Scores(
            terms={"gate": {name: gate.cpu() for name, gate in self._gates.items()}}, settled=False
        )

    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """See `Tracker.follow`: the gates go into B, and a' begins anew from 0.

        Its moments stay with the ranks that stay, and are zero for new ones.
        """
        origin: list[int] = []  # of every rank after the round: where it was before
        start = 0
        for name, num_ranks in self._num_ranks.items():
            origin += [start + index for index in plan.kept[name]] + [NEW] * plan.added[name]
            start += num_ranks
        where = torch.tensor(origin, device=self._logits.device)
        gates = torch.where(where == NEW, 1.0, self._values()[where])
        moments = {
            key: torch.where(where == NEW, 0.0, value[where]) if value.ndim else value
            for key, value in self._optimizer.state.pop(self._logits).items()
        }
        ranks_now = {name: plan.rank_after(name) for name in self._num_ranks}
        self._num_ranks = {name: rank for name, rank in ranks_now.items() if rank}
        fold_gates(
            self._model,
            self._by_module(gates),
            optimizer=optimizer,
            adapter_name=self._adapter_name,
        )
        self._logits = torch.zeros_like(gates, requires_grad=True)
        self._optimizer.param_groups[0]["params"] = [self._logits]
        self._optimizer.state[self._logits] = moments
        self._gates = self._by_module(self._values())

    def finish(self) -> None:
        """See `Tracker.finish`: the gates go into B."""
        fold_gates(self._model, self._gates, adapter_name=self._adapter_name)
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, Tensor]:
        """See `Tracker.state`."""
        moments = self._optimizer.state.get(self._logits, {})
        return {LOGITS: self._logits.detach().clone(), **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Tracker.load_state`."""
        logits = state.get(LOGITS)
        if logits is None or logits.shape != self._logits.shape:
            raise ValueError(
                f"The gates to go on with are not those of {len(self._logits)} ranks; restore the "
                "adapter of the same checkpoint first."
            )
        moments = {key: value.clone() for key, value in state.items() if key != LOGITS}
        with torch.no_grad():
            self._logits.copy_(logits)
        self._optimizer.state[self._logits] = {
            # Adam counts its steps on the CPU.
            key: value.to(self._logits.device) if value.ndim else value
            for key, value in moments.items()
        }
        self._gates = self._by_module(self._values())

    def _values(self) -> Tensor:
        """The gate of every rank, without a graph."""
        return 2 * torch.sigmoid(self._logits.detach())

    def _by_module(self, values: Tensor) -> dict[str, Tensor]:
        parts = torch.split(values, list(self._num_ranks.values()))
        return dict(zip(self._num_ranks, parts, strict=True))
