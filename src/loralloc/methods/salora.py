"""SaLoRA (Hu et al. 2023): hard-concrete gates, and a Lagrangian for the ranks that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import TaskType
from torch import Tensor
from torch.optim import Adam, Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from loralloc.allocation.objective import Batch
from loralloc.methods.gated import START, GatedLora
from loralloc.methods.method import About
from loralloc.methods.orthogonal import off_orthonormal

BETA, GAMMA, ZETA = 1.0, -0.1, 1.1
"""Temperature of the concrete distribution, and the interval that it is stretched to."""

EPSILON = 1e-6
"""Noise is uniform on (epsilon, 1 - epsilon)."""

TRAVEL = 18
"""How far log a can move at most, in all, until the ranks are pruned."""

DAMPING = 100
"""Learning rate of lambda_2 over that of lambda_1. In a run of a few dozen steps lambda_1 alone
would grow until the density has long passed its target, and need as long to fall again."""


@dataclass(kw_only=True)
class SaLora(GatedLora):
    """Every rank has a gate z that is 0, 1 or between, of learned log-odds log a.

    One z is drawn a step and shared by its batches; evaluation has u = 1/2,

        z = clip(sigmoid((log u - log(1 - u) + log a) / beta) (zeta - gamma) + gamma, 0, 1)

    With C the parameters expected to be left, C_0 all of them and t falling from 1 to 1/2, the loss
    gains, at a minimum over log a and a maximum over the multipliers,

        lambda_1 (C / C_0 - t) + lambda_2 (C / C_0 - t)^2

    and 0.1 times the mean over modules of ||B^T B - I||_F + ||A A^T - I||_F. At the end of
    `prune_by` the ranks with the highest log a are kept. `findings` has the density C / C_0 just
    before, which is t where the constraint was met.
    """

    log_a: float = 2.94
    """log a at the start: z > 0 with a probability of 0.995."""

    gate_lr: float | None = None
    """Adam's learning rate of log a and of lambda_1; that of lambda_2 is a hundred times as high.
    None for one at which log a can move by 18 until the ranks are pruned, twice as far as an open
    gate is from a closed one, however short the run."""

    warmup_share: float = 0.3
    """Share of the run in which t falls."""

    orthogonality: float = 0.1
    """Weight in the loss of how far the factors are from orthogonal."""

    about: ClassVar[About] = About(
        name="salora",
        title="SaLoRA",
        paper="Hu et al. 2023",
        status="reconstruction",
        initialisation="ours",
        settings="ours",
        learning_rate=5e-4,
        rate_from="LoRA's; no code was published",
        differs="No code was published. The quadratic term and the falling target are FLOP's (Wang "
        "et al. 2020), as is the start near open gates; B begins at zero; learning rates and the "
        "step to prune at are chosen here.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        self.multipliers = [torch.zeros((), device="cpu", requires_grad=True) for _ in range(2)]
        self.learned += self.multipliers
        self.noise: Tensor | None = None
        return self.model

    def first_gates(self, num_gates: int) -> Tensor:
        """See `GatedLora.first_gates`."""
        return torch.full((num_gates,), self.log_a, device="cpu")

    def gate(self, where: slice) -> Tensor:
        """See `GatedLora.gate`."""
        # From the leaf in every call: a z that calls share would be gone after one's backward pass.
        noise = self.noise if self.model.training else None
        return hard_concrete(self.gates[where], None if noise is None else noise[where])

    def final_gates(self) -> Tensor:
        """See `GatedLora.final_gates`."""
        return hard_concrete(self.gates.detach())

    def importance(self) -> Tensor:
        """See `GatedLora.importance`."""
        return self.gates.detach()

    def gate_optimizer(self) -> Optimizer:
        """See `GatedLora.gate_optimizer`."""
        rate = TRAVEL / self.prune_step if self.gate_lr is None else self.gate_lr
        linear, quadratic = self.multipliers
        groups: list[dict[str, Any]] = [
            {"params": [self.gates]},
            {"params": [linear], "maximize": True},
            {"params": [quadratic], "maximize": True, "lr": rate * DAMPING},
        ]
        return Adam(groups, lr=rate)

    def told_by_gates(self, kept: Tensor) -> dict[str, float]:
        """See `GatedLora.told_by_gates`: the density, and what it was to be."""
        return {"density": float(self._density().detach()), "target_density": self._target()}

    def watch(self, batch: Batch) -> None:
        """See `Method.watch`: draw the step's z before its first batch."""
        if self.is_gated and self.model.training and self.noise is None:
            uniform = EPSILON + (1 - 2 * EPSILON) * torch.rand(len(self.gates), device="cpu")
            self.noise = uniform.logit().to(self.gates)
            replicas.share([self.noise])

    def extra_loss(self) -> Tensor | None:
        """See `Method.extra_loss`."""
        if not self.is_gated:
            return None
        excess = self._density() - self._target()
        distances = [
            off_orthonormal(weight_a(layer)) + off_orthonormal(weight_b(layer).T)
            for layer in lora_layers(self.model).values()
        ]
        return (
            self.multipliers[0] * excess
            + self.multipliers[1] * excess**2
            + self.orthogonality * torch.stack(distances).mean()
        )

    def update_gates(self) -> None:
        """See `GatedLora.update_gates`."""
        super().update_gates()
        self.noise = None

    def _density(self) -> Tensor:
        """C / C_0: the share of the parameters that is expected to be left."""
        return (self.costs * chance_open(self.gates)).sum() / self.costs.sum()

    def _target(self) -> float:
        """t: the share of the parameters that is to be left."""
        warmup = max(1.0, self.warmup_share * self.session.num_steps)
        return 1 - (1 - 1 / START) * min(1.0, self.num_steps_done / warmup)


def hard_concrete(log_a: Tensor, noise: Tensor | None = None) -> Tensor:
    """The gates z of log a, elementwise.

    Args:
        log_a: Of any shape.
        noise: log u - log(1 - u), of the same shape; none for evaluation.
    """
    concrete = torch.sigmoid((log_a if noise is None else noise + log_a) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chance_open(log_a: Tensor) -> Tensor:
    """The probability that z > 0, elementwise."""
    return torch.sigmoid(log_a - BETA * math.log(-GAMMA / ZETA))
