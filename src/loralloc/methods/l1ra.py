"""L1RA (Singh et al. 2025): an L1 penalty empties ranks, and other modules receive them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loralloc.allocation.layers import lora_layers, weight_a
from loralloc.allocation.policy import Limits, Plan, share_out
from loralloc.methods.factored import FactoredLora
from loralloc.methods.method import About
from loralloc.methods.session import Session

TAKEN_OFF = 0.53
"""What the penalty takes off c in the authors' run for Mistral-7B: 0.02 times 5e-3 in some 5,300
steps."""


@dataclass(kw_only=True)
class L1Ra(FactoredLora):
    """y = W x + s B (c * (A x)), A normal with standard deviation 1/r, B zero and c one at first.

    After Adam's step of c, with the learning rate `gate_lr` throughout, c becomes c - gate_lr
    lambda, held between 0 and 1. Every `interval` of the run the ranks whose c is zero go, but for
    a module's last, and the modules with none receive theirs in turns, those of the largest least
    c first; a new rank begins as the first ones did.
    """

    scale: float = 1.0
    """Source: the authors' configurations, alpha as large as the rank."""

    penalty: float | None = None
    """lambda; None for the one that takes as much off c in all of the run as in the authors' (their
    5e-3 takes off 0.04 in 375 steps, which moves no rank)."""

    gate_lr: float = 0.02
    """Learning rate of c. Source: the same."""

    interval: float = 0.05
    """Share of the run between two rounds. Source: the same."""

    about: ClassVar[About] = About(
        name="l1ra",
        title="L1RA",
        paper="Singh et al. 2025",
        status="faithful",
        initialisation="published",
        settings="ours",
        learning_rate=1e-4,
        rate_from="the authors' configuration for Mistral-7B",
        differs="The penalty takes as much off c as in the authors' run, whatever the length of "
        "the run, and as a proximal step, so that c can become exactly zero; as many ranks are "
        "given as the parameters of those that went can buy, so that the budget holds in "
        "parameters; and the optimiser goes on, which the authors' code begins anew.",
        merges=True,
    )
    factor_at_start: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is out of its range.
        """
        for name in ("penalty", "gate_lr"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` is {value}; it must be a number from 0.")
        if not 0 < self.interval < 1:
            raise ValueError(
                f"`interval` is {self.interval}; it is a share of the run, between 0 and 1."
            )

    def draw(self, layer: LoraLayer) -> None:
        """See `FactoredLora.draw`."""
        torch.nn.init.normal_(weight_a(layer), std=1 / self._first_rank)

    @property
    def _first_rank(self) -> int:
        assert self.rank is not None, "fit() chooses it"
        return self.rank

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """See `Method.prepare`."""
        self.spare = self.moved = 0
        return super().prepare(*args, **kwargs)

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        super().begin(session)
        self.every = max(1, round(self.interval * session.num_steps))
        self.off = TAKEN_OFF / session.num_steps
        """What the penalty takes off c in a step."""
        if self.penalty is not None:
            self.off = self.gate_lr * self.penalty

    def factor_lr(self) -> float:
        """See `FactoredLora.factor_lr`."""
        return self.gate_lr

    def observe(self, number: int) -> None:
        """See `FactoredLora.observe`: the penalty's step."""
        for factor in self.factors.values():
            factor.data = (factor.data - self.off).clamp_(0, 1)

    def allocate(self, number: int) -> None:
        """See `FactoredLora.allocate`."""
        if number % self.every or number >= self.session.num_steps:
            return  # what would be given last would never train
        values = {name: factor.detach().cpu() for name, factor in self.factors.items()}
        plan = reassign(values, Limits(num_pruned=0, cost=self.costs(), spare=self.spare))
        self.spare = plan.spare
        self.moved += sum(map(len, plan.pruned.values()))
        self.move(plan, new=self.factor_at_start)
        generator = torch.Generator().manual_seed(self.session.seed * 1_000_003 + number)
        for name, layer in lora_layers(self.model).items():
            count, a = plan.added[name], weight_a(layer).data
            new = torch.randn(count, a.shape[1], generator=generator, device="cpu")
            a[len(a) - count :] = new.to(a) / self._first_rank

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {**super().state(), "spare": self.spare, "moved": self.moved}

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.spare, self.moved = int(state["spare"]), int(state["moved"])

    def findings(self) -> dict[str, float]:
        """See `Method.findings`: ranks that went to other modules, in all rounds."""
        return {"ranks_moved": float(self.moved)}


def reassign(values: Mapping[str, Tensor], limits: Limits) -> Plan:
    """Who loses ranks, and who receives them.

    Args:
        values: c of every module, shape (num_ranks,), in model order, which breaks ties.
        limits: Its `cost` and `spare` are read.
    """
    kept, pruned = {}, {}
    for name, c in values.items():
        empty = (c <= 0).nonzero().flatten().tolist()
        gone = empty[:-1] if len(empty) == len(c) else empty
        if gone:
            pruned[name] = tuple(gone)
        kept[name] = tuple(i for i in range(len(c)) if i not in gone)
    intact = [name for name, c in values.items() if (c > 0).all()]
    order = sorted(intact, key=lambda name: -float(values[name].min()))
    available = limits.spare + sum(limits.cost_of(n) * len(gone) for n, gone in pruned.items())
    given = share_out(available, {name: len(values[name]) for name in order}, limits)
    return Plan(
        kept=kept,
        added={name: given.get(name, 0) for name in values},
        pruned=pruned,
        spare=available - sum(limits.cost_of(name) * count for name, count in given.items()),
    )
