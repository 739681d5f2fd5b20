"""ElaLoRA (Chang et al. 2025): triplets that are pruned and grown in the same round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import TaskType
from torch import Tensor

from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.policy import Limits, Plan
from loralloc.methods.factored import TripletLora
from loralloc.methods.method import About
from loralloc.methods.session import Session
from loralloc.methods.triplet_sensitivity import TripletSensitivity

NEW_FACTOR = 1e-13
"""The factor of a new triplet: as good as none. Source: the authors' code."""


@dataclass(kw_only=True)
class ElaLora(TripletLora):
    """y = W x + s B (e * (A x)), A and B normal with standard deviation 0.02, e zero at the start.

    Every step smooths AdaLoRA's sensitivity of all triplets, S = s(e_i) + mean_j s(A_ij) + mean_j
    s(B_ji). Every `interval` of the run, after its first `warmup_share` and before its last
    `final_share`, the k least of each module (but for its last) are candidates. Of all candidates
    the b least go, and the modules of the b largest receive one triplet each, with b falling from
    `moved` to 0 as 1 - p^3 over the time between. A new triplet is a random direction from which
    that of the others is taken off, of length 1, with a factor of 1e-13.
    """

    scale: float = 1.6
    """Source: the authors' scripts, alpha 16 with 10 triplets."""

    candidates: int = 2
    """k: triplets of a module that a round may prune, at least 1."""

    moved: int = 4
    """b at the first round, at least 1."""

    warmup_share: float = 0.15
    """Share of the run before the first round. Source: the authors' scripts for SST-2 and RTE."""

    final_share: float = 0.45
    """Share of the run after the last. Source: the same; for RTE it is 0.26."""

    interval: float = 0.025
    """Share of the run between two rounds. Source: the same."""

    about: ClassVar[About] = About(
        name="elalora",
        title="ElaLoRA",
        paper="Chang et al. 2025",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=8e-4,
        rate_from="the authors' script for SST-2 (DeBERTaV3-base)",
        differs="As many triplets are given as the parameters of those that went can buy, more or "
        "fewer than b, so that the budget holds in parameters, not in triplets; Adam's moments "
        "stay, which the authors' code loses. Gradients of the factors are not clipped with the "
        "others.",
        merges=True,
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is out of its range.
        """
        for name in ("candidates", "moved"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        for name in ("warmup_share", "final_share", "interval"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(
                    f"`{name}` is {share}; it is a share of the run, from 0 to less than 1."
                )

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        self.sensitivity = TripletSensitivity(self.model, self.factors)
        self.spare = 0
        """Parameters that rounds so far could not spend."""
        return self.model

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: The run is too short for a round.
        """
        super().begin(session)
        num_steps = session.num_steps
        first, last = (round(share * num_steps) for share in (self.warmup_share, self._end))
        every = max(1, round(self.interval * num_steps))
        self.rounds = range(max(first, 1) + every, last, every)
        if not self.rounds:
            raise ValueError(
                f"Of the run's {num_steps} steps elalora has its rounds between step {first} and "
                f"step {last}, {every} apart, which leaves none; train for longer, or lower "
                "`warmup_share`, `final_share` or `interval`."
            )
        self.first, self.last = first, last

    @property
    def _end(self) -> float:
        return 1 - self.final_share

    def observe(self, number: int) -> None:
        """See `FactoredLora.observe`."""
        if number < self.last:
            self.sensitivity.observe()

    def allocate(self, number: int) -> None:
        """See `FactoredLora.allocate`."""
        if number not in self.rounds:
            return
        progress = (number - self.first) / (self.last - self.first)
        num_moved = round(self.moved * (1 - progress**3))
        if not num_moved:
            return
        scores = self.sensitivity.score().importance
        plan = exchange(
            scores,
            Limits(num_pruned=num_moved, cost=self.costs(), spare=self.spare),
            most=self.candidates,
        )
        self.spare = plan.spare
        self.move(plan, new=NEW_FACTOR)
        self.sensitivity.follow(plan, optimizer=None)
        self.sensitivity.factors = self.factors
        generator = torch.Generator().manual_seed(self.session.seed * 1_000_003 + number)
        for name, (a, b) in weights_ab(lora_layers(self.model)).items():
            if plan.added[name]:
                aside(a.data, plan.added[name], generator)
                aside(b.data.T, plan.added[name], generator)

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`: after the last round."""
        return self.rounds[-1]

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {
            **super().state(),
            "sensitivity": self.sensitivity.state(),
            "spare": self.spare,
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.sensitivity.factors = self.factors
        if state["sensitivity"]:
            self.sensitivity.load_state(state["sensitivity"])
        self.spare = int(state["spare"])


def exchange(scores: Mapping[str, Tensor], limits: Limits, *, most: int) -> Plan:
    """What a round prunes and gives.

    What the b largest candidates leave of the parameters goes down the list, past those that went.
    Ties go to the earlier module, then to the lower index.

    Args:
        scores: Of every triplet: a tensor of shape (num_ranks,) for each module.
        limits: Its `num_pruned` (b), `cost` and `spare` are read.
        most: Candidates of a module (k).
    """
    pool = [
        (score, order, index)
        for order, values in enumerate(scores.values())
        for score, index in sorted((v, i) for i, v in enumerate(values.tolist()))[
            : min(most, len(values) - 1)
        ]
    ]
    pool.sort()
    names = list(scores)
    gone: dict[str, list[int]] = {name: [] for name in names}
    for _, order, index in pool[: limits.num_pruned]:
        gone[names[order]].append(index)
    available = limits.spare + sum(limits.cost_of(n) * len(x) for n, x in gone.items())
    added = dict.fromkeys(names, 0)
    highest = sorted(pool, key=lambda entry: -entry[0])  # stable
    for place, (_, order, index) in enumerate(highest):
        name = names[order]
        if place >= limits.num_pruned and index in gone[name]:
            continue
        if limits.cost_of(name) <= available:
            added[name] += 1
            available -= limits.cost_of(name)
    return Plan(
        kept={
            name: tuple(i for i in range(len(values)) if i not in gone[name])
            for name, values in scores.items()
        },
        added=added,
        pruned={name: tuple(sorted(indices)) for name, indices in gone.items() if indices},
        spare=available,
    )


def aside(rows: Tensor, num_new: int, generator: torch.Generator) -> None:
    """Give the last rows directions of their own, in place, one after the other.

    Each is v - R^T R v, of length 1, for a normal v and the rows R before it: what orthonormal
    rows leave of v.

    Args:
        rows: Shape (num_ranks, width).
        num_new: How many of the last.
        generator: On the CPU.
    """
    for index in range(len(rows) - num_new, len(rows)):
        there = rows[:index]
        new = torch.randn(rows.shape[1], generator=generator, device="cpu").to(rows)
        new = new - there.T @ (there @ new)
        rows[index] = new / max(float(new.norm()), math.ulp(1.0))
