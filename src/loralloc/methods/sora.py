"""SoRA (Ding et al. 2023): gates that a proximal step makes exactly zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import TaskType
from torch import Tensor
from torch.optim import AdamW, Optimizer

from loralloc.methods.gated import GatedLora, keep_highest
from loralloc.methods.method import About
from loralloc.methods.session import Session

TRAVEL = 6.0
"""How far a gate can move, in all, until the budget is due: the learning rates of the authors' runs
add up to about as much (8e-4 falling to 0, over 14,000 steps)."""

FASTEST = 0.1
"""The most that a gate may move in a step, which bounds its travel in a run of a few steps."""

CHECK_EVERY = 50
"""Steps between two looks at the budget; a twentieth of a run of less than 20 times as many."""


@dataclass(kw_only=True)
class Sora(GatedLora):
    """Every rank has a gate g, standard normal at the start; the loss gains eta times mean |g|.

    The gates have an AdamW of their own, without weight decay; after each of its steps

        g <- sign(g) max(|g| - xi, 0)

    How far a gate moves in a run decides whether it is chosen by what it is good for or by the
    number that it began as. So the learning rate of the gates is such that they can move six
    standard deviations of their draw in the time to prune, however many steps that has; and xi is
    set anew in every step such that by itself it makes as many gates zero as have to be, just in
    time: the largest |g| among those that would go now, over the steps that are left.

    A gate may come back until the budget is reached, which is at the end of `prune_by`. With an xi
    that is given it is reached as soon as the gates that are left fit it, those apart that xi alone
    makes zero before the next look. `findings` has the share of the kept ranks that the draw alone
    would have kept: 1 says that nothing was learned, and ranks kept at random have about 1/2.
    """

    eta: float = 1e-3
    """Weight of mean |g| in the loss."""

    xi: float | None = None
    """What every step takes from every |g|; None for what fits the budget and the time."""

    gate_lr: float | None = None
    """Learning rate of the gates; None for 6 over the steps until the budget is due, but 0.1 at
    most."""

    about: ClassVar[About] = About(
        name="sora",
        title="SoRA",
        paper="Ding et al. 2023",
        status="port",
        initialisation="published",
        settings="ours",
        learning_rate=8e-4,
        rate_from="the authors' script (DeBERTaV3-base)",
        differs="Published without a budget: here the smallest gates are pruned when it is due, "
        "and the rest trains on as plain LoRA. Gates have a learning rate by which they move as "
        "far as in the authors' runs, whatever the length of the run, and xi fits the budget. The "
        "proximal step is the paper's; in the code all gates below 2 xi become zero.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        prepared = super().prepare(model, task_type=task_type, heads=heads)
        self.drawn = self.gates.detach().abs()
        return prepared

    def first_gates(self, num_gates: int) -> Tensor:
        """See `GatedLora.first_gates`."""
        return torch.randn(num_gates, device="cpu")

    def gate(self, where: slice) -> Tensor:
        """See `GatedLora.gate`."""
        return self.gates[where]

    def final_gates(self) -> Tensor:
        """See `GatedLora.final_gates`."""
        return self.gates.detach()

    def importance(self) -> Tensor:
        """See `GatedLora.importance`."""
        return self.gates.detach().abs()

    def gate_optimizer(self) -> Optimizer:
        """See `GatedLora.gate_optimizer`."""
        rate = min(FASTEST, TRAVEL / self.prune_step) if self.gate_lr is None else self.gate_lr
        return AdamW(self.learned, lr=rate, weight_decay=0.0)

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        super().begin(session)
        self.check_every = min(CHECK_EVERY, max(1, session.num_steps // 20))

    def extra_loss(self) -> Tensor | None:
        """See `Method.extra_loss`."""
        return self.eta * self.gates.abs().mean() if self.is_gated else None

    def update_gates(self) -> None:
        """See `GatedLora.update_gates`."""
        super().update_gates()
        xi = self._fitting_threshold() if self.xi is None else self.xi
        self.gates.data = soft_threshold(self.gates.data, xi)

    def is_due(self, number: int) -> bool:
        """See `GatedLora.is_due`."""
        if self.xi is None or number % self.check_every:
            return False
        # Counting those about to go keeps the budget from being overshot between two looks.
        left = self.costs[self.importance() > self.xi * self.check_every].sum()
        return bool(left <= self.budget)

    def told_by_gates(self, kept: Tensor) -> dict[str, float]:
        """See `GatedLora.told_by_gates`: how much of what is kept the draw would have kept."""
        by_draw = keep_highest(self.drawn.to(self.costs.device), self.costs, self.budget)
        return {"overlap_with_draw": float((kept & by_draw).sum() / kept.sum())}

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        state = super().state()
        return {**state, "drawn": self.drawn} if self.is_gated else state

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.drawn = state.get("drawn", self.drawn)

    def _fitting_threshold(self) -> float:
        """The xi by which alone the gates of least value would be zero when the budget is due."""
        size = self.importance()
        kept = keep_highest(size, self.costs, self.budget)
        steps_left = max(1, self.prune_step - self.num_steps_done)
        return float(size[~kept].max()) / steps_left


def soft_threshold(gates: Tensor, xi: float) -> Tensor:
    """The proximal step of xi |g|: sign(g) max(|g| - xi, 0)."""
    return gates.sign() * (gates.abs() - xi).clamp(min=0)
