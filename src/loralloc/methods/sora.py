"""SoRA (Ding et al. 2023): gates that a proximal step makes exactly zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from loralloc.methods.gated import GatedLora
from loralloc.methods.method import About, Session

MEDIAN = 0.6745
"""Median of |g| where g is standard normal: half of the gates are below it at the start."""

CHECK_EVERY = 50
"""Steps between two looks at the budget; a twentieth of a run of less than 20 times as many."""


@dataclass(kw_only=True)
class Sora(GatedLora):
    """Every rank has a gate g, standard normal at the start; the loss gains eta times mean |g|.

    The gates have an AdamW of their own, with the run's learning rate and no weight decay; after
    each of its steps, whatever the learning rate,

        g <- sign(g) max(|g| - xi, 0)

    A gate may come back until the budget is reached: that is when the gates that are left, those
    apart that xi alone makes zero before the next look, fit it, or by the end of `prune_by`.
    """

    eta: float = 1e-3

    xi: float | None = None
    """None for the xi that alone would make half of the gates zero in the time to prune."""

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
        "and the rest trains on as plain LoRA. The proximal step is the paper's; in the code all "
        "gates below 2 xi become zero.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

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
        return AdamW(self.learned, weight_decay=0.0)

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        super().begin(session)
        self.threshold = MEDIAN / self.prune_step if self.xi is None else self.xi
        self.check_every = min(CHECK_EVERY, max(1, session.num_steps // 20))

    def extra_loss(self) -> Tensor | None:
        """See `Method.extra_loss`."""
        return self.eta * self.gates.abs().mean() if self.is_gated else None

    def update_gates(self) -> None:
        """See `GatedLora.update_gates`."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.session.optimizer.param_groups[0]["lr"]
        super().update_gates()
        self.gates.data = soft_threshold(self.gates.data, self.threshold)

    def is_due(self, number: int) -> bool:
        """See `GatedLora.is_due`."""
        if number % self.check_every:
            return False
        # Counting those about to go keeps the budget from being overshot between two looks.
        left = self.costs[self.importance() > self.threshold * self.check_every].sum()
        return bool(left <= self.budget)


def soft_threshold(gates: Tensor, xi: float) -> Tensor:
    """The proximal step of xi |g|: sign(g) max(|g| - xi, 0)."""
    return gates.sign() * (gates.abs() - xi).clamp(min=0)
