"""IncreLoRA (Zhang et al. 2023): triplets are added, to the modules that matter most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig, TaskType
from torch import Tensor

from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from loralloc.allocation.policy import Limits, Plan, share_out
from loralloc.methods.factored import STD, TripletLora
from loralloc.methods.method import About
from loralloc.methods.session import Session
from loralloc.methods.weight_gradients import WeightGradients

BETA = 0.85
"""Share of the old mean, and of the old deviation, in the new. Source: the authors' scripts."""

RESERVE_FACTOR = 1e-5
"""The factor of a triplet that is in reserve. Source: the authors' code."""

START = 1
"""Triplets of a module at the start. Source: the authors' scripts."""


@dataclass(kw_only=True)
class IncreLora(TripletLora):
    """y = W x + s r / r_m B (e * (A x)), from one triplet a module up to the budget of r for all.

    r_m is the number of a module's triplets now, so that its scaling falls as it grows. With
    D = s r / r_m B diag(e) A and G the gradient by it, every step takes of each module
    I = sum |D * G| / sqrt(number of elements), smooths I and its deviation as AdaLoRA does, and
    scores the module by their product. Rounds are evenly spread over the run until `grown_by`; in
    each the modules of the `top` highest scores receive `step_size` triplets. Those have been there
    before, in reserve: their rows and columns learn from the start, with a factor of 1e-5 that
    stays. From then on the factor trains, and as many new ones stand in reserve. In the last round
    the modules take turns until the budget is spent, and the reserves go.
    """

    top: int | None = None
    """Modules that a round gives to (h); None for a twelfth of all. Source: the authors' scripts,
    6 of 72."""

    step_size: int | None = None
    """Triplets that such a module receives; None for half of `rank`. Source: the authors' code."""

    grown_by: float = 0.45
    """Share of the run by which the budget is reached. Source: the authors' script for SST-2."""

    about: ClassVar[About] = About(
        name="increlora",
        title="IncreLoRA",
        paper="Zhang et al. 2023 (IncreLoRA)",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=8e-4,
        rate_from="the authors' script for SST-2 (DeBERTaV3-base)",
        differs="The budget is counted in parameters, and rounds are placed by the run's length; "
        "new triplets have the run's learning rate rather than a warm-up of their own.",
        merges=True,
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is out of its range.
        """
        for name in ("top", "step_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if not 0 < self.grown_by < 1:
            raise ValueError(
                f"`grown_by` is {self.grown_by}; it is a share of the run, between 0 and 1."
            )

    @property
    def _step(self) -> int:
        assert self.rank is not None, "fit() chooses it"
        return self.step_size or max(1, self.rank // 2)

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`: the first triplets and those in reserve."""
        return self.lora_config(model, START + self._step, task_type=task_type, heads=heads)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        assert self.rank is not None, "fit() chooses it"
        self.active = dict.fromkeys(self.factors, START)
        """Triplets of every module without those in reserve."""
        costs = self.costs()
        self.budget = self.rank * sum(costs.values())
        for factor in self.factors.values():
            factor.data[START:] = RESERVE_FACTOR
        self._mean = dict.fromkeys(self.factors, 0.0)
        self._deviation = dict.fromkeys(self.factors, 0.0)
        self._seen: Counter[str] = Counter()
        self._sums = dict.fromkeys(self.factors, 0.0)
        self.is_grown = False
        self._gradients: WeightGradients | None = None
        return self.model

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        super().begin(session)
        costs = self.costs()
        top = self.top or max(1, len(costs) // 12)
        mean = sum(costs.values()) / len(costs)
        to_give = self.budget - START * sum(costs.values())
        num_rounds = max(1, math.ceil(to_give / (top * self._step * mean)))
        self.end = max(1, round(self.grown_by * session.num_steps))
        self.every = max(1, self.end // num_rounds)
        self._top = top
        self._layers = lora_layers(self.model)
        if not self.is_grown and self._gradients is None:
            self._gradients = WeightGradients(self._layers, self._see)

    def final_factor(self, name: str) -> Tensor:
        """See `FactoredLora.final_factor`."""
        assert self.rank is not None, "fit() chooses it"
        return self.factors[name] * (self.rank / self.active[name])

    def before_factors(self) -> None:
        """See `FactoredLora.before_factors`: those in reserve stay as they are."""
        for name, factor in self.factors.items():
            if factor.grad is not None and not self.is_grown:
                factor.grad[self.active[name] :] = 0

    def observe(self, number: int) -> None:
        """See `FactoredLora.observe`."""
        if self.is_grown:
            return
        names = list(self._mean)
        seen = [self._sums[name] / max(1, self._seen[name]) for name in names]
        # Batches of other processes count as those that are accumulated do.
        values = replicas.averaged({"I": torch.tensor(seen, dtype=torch.float64)})["I"].tolist()
        for name, value in zip(names, values, strict=True):
            self._mean[name] = BETA * self._mean[name] + (1 - BETA) * value
            distance = abs(value - self._mean[name])
            self._deviation[name] = BETA * self._deviation[name] + (1 - BETA) * distance
            self._sums[name] = 0.0
        self._seen.clear()

    def allocate(self, number: int) -> None:
        """See `FactoredLora.allocate`."""
        is_last = number >= self.end
        if self.is_grown or (number % self.every and not is_last):
            return
        costs = self.costs()
        scores = {name: self._mean[name] * self._deviation[name] for name in costs}
        order = sorted(costs, key=lambda name: -scores[name])  # stable: ties in model order
        available = self.budget - sum(self.active[name] * cost for name, cost in costs.items())
        if is_last:
            limits = Limits(num_pruned=0, cost=costs)
            given = share_out(available, {name: self.active[name] for name in order}, limits)
        else:
            given = {}
            for name in order[: self._top]:
                given[name] = min(self._step, available // costs[name])
                available -= given[name] * costs[name]
        generator = torch.Generator().manual_seed(self.session.seed * 1_000_003 + number)
        self._grow({name: given.get(name, 0) for name in costs}, is_last, generator)

    def _grow(self, given: Mapping[str, int], is_last: bool, generator: torch.Generator) -> None:
        """Let those in reserve train, and draw others in their place, but in the last round."""
        kept, added, pruned = {}, {}, {}
        for name, factor in self.factors.items():
            present = len(factor)
            self.active[name] += given[name]
            wanted = self.active[name] if is_last else present + given[name]
            kept[name] = tuple(range(min(present, wanted)))
            added[name] = max(0, wanted - present)
            if wanted < present:
                pruned[name] = tuple(range(wanted, present))
        self.move(Plan(kept=kept, added=added, pruned=pruned), new=RESERVE_FACTOR)
        for name, layer in lora_layers(self.model).items():
            count = added[name]
            for rows in (weight_a(layer).data, weight_b(layer).data.T):
                new = torch.randn(count, rows.shape[1], generator=generator, device="cpu")
                rows[len(rows) - count :] = STD * new.to(rows)
        if is_last:
            self.is_grown = True
            self._stop_seeing()

    def _see(self, name: str, gradient: Tensor) -> None:
        """Add up I of a batch."""
        layer = self._layers[name]
        a, b = weight_a(layer).detach().float(), weight_b(layer).detach().float()
        factor = self.final_factor(name).detach()
        update = layer.scaling["default"] * b @ (factor[:, None] * a)
        self._sums[name] += sensitivity(update, gradient)
        self._seen[name] += 1

    def _stop_seeing(self) -> None:
        if self._gradients is not None:
            self._gradients.close()
        self._gradients = None

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`: the budget is reached."""
        return self.end

    def finish(self) -> None:
        """See `Method.finish`."""
        if not self.is_grown:
            raise RuntimeError(
                f"increlora reaches its budget at step {self.end}, and the run ended before, with "
                "fewer ranks than that; train until then, or lower `grown_by`."
            )
        super().finish()

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {
            **super().state(),
            "active": dict(self.active),
            "mean": dict(self._mean),
            "deviation": dict(self._deviation),
            "is_grown": self.is_grown,
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.active, self.is_grown = dict(state["active"]), bool(state["is_grown"])
        self._mean, self._deviation = dict(state["mean"]), dict(state["deviation"])


def sensitivity(update: Tensor, gradient: Tensor) -> float:
    """I of a module: sum |D * G| over the root of the number of elements.

    Args:
        update: D, shape (out_features, in_features).
        gradient: G, of the same shape.
    """
    return float((update * gradient).abs().sum() / math.sqrt(update.numel()))
