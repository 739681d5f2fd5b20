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
from loralloc.methods.method import About, Session
from loralloc.methods.sora import soft_threshold


@dataclass(kw_only=True)
class L1Ra(FactoredLora):
    """y = W x + s B (c * (A x)), A normal with standard deviation 1/r, B zero and c one at first.

    After Adam's step of c, with the learning rate `gate_lr` throughout, c becomes sign(c) max(|c| -
    gate_lr lambda, 0). Every `interval` of the run the ranks whose c is not above zero go, but for
    a module's last, and the modules that lost none receive theirs in turns, those of the largest
    least c first; a new rank begins as the first ones did.
    """

    scale: float = 1.0
    """Source: the authors' configurations, alpha as large as the rank."""

    penalty: float = 5e-3
    """lambda. Source: the authors' configuration for Mistral-7B."""

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
        settings="published",
        learning_rate=1e-4,
        rate_from="the authors' configuration for Mistral-7B",
        differs="The penalty is taken off as a proximal step, so that c can become exactly zero; "
        "as many ranks are given as the parameters of those that went can buy, so that the budget "
        "holds in parameters; and the optimiser goes on, which the authors' code begins anew.",
        merges=True,
    )
    factor_at_start: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is out of its range.
        """
        for name in ("penalty", "gate_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a number from 0.")
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
        self.spare = 0
        return super().prepare(*args, **kwargs)

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        super().begin(session)
        self.every = max(1, round(self.interval * session.num_steps))

    def factor_lr(self) -> float:
        """See `FactoredLora.factor_lr`."""
        return self.gate_lr

    def observe(self, number: int) -> None:
        """See `FactoredLora.observe`: the penalty's step."""
        for factor in self.factors.values():
            factor.data = soft_threshold(factor.data, self.gate_lr * self.penalty)

    def allocate(self, number: int) -> None:
        """See `FactoredLora.allocate`."""
        if number % self.every or number >= self.session.num_steps:
            return  # what would be given last would never train
        values = {name: factor.detach().cpu() for name, factor in self.factors.items()}
        plan = reassign(values, Limits(num_pruned=0, cost=self.costs(), spare=self.spare))
        self.spare = plan.spare
        self.move(plan, new=self.factor_at_start)
        generator = torch.Generator().manual_seed(self.session.seed * 1_000_003 + number)
        for name, layer in lora_layers(self.model).items():
            count, a = plan.added[name], weight_a(layer).data
            new = torch.randn(count, a.shape[1], generator=generator, device="cpu")
            a[len(a) - count :] = new.to(a) / self._first_rank

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {**super().state(), "spare": self.spare}

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.spare = int(state["spare"])


def reassign(values: Mapping[str, Tensor], limits: Limits) -> Plan:
    """Who loses ranks, and who receives them.

    Args:
        values: c of every module, shape (num_ranks,), in model order, which breaks ties.
        limits: Its `cost` and `spare` are read.
    """
    kept, pruned = {}, {}
    for name, c in values.items():
        empty = (c <= 0).nonzero().flatten().tolist()
        if len(empty) == len(c):
            empty = empty[:-1]
        if empty:
            pruned[name] = tuple(empty)
        kept[name] = tuple(i for i in range(len(c)) if i not in empty)
    intact = [name for name in values if name not in pruned]
    order = sorted(intact, key=lambda name: -float(values[name].min()))
    available = limits.spare + sum(limits.cost_of(n) * len(gone) for n, gone in pruned.items())
    given = share_out(available, {name: len(values[name]) for name in order}, limits)
    return Plan(
        kept=kept,
        added={name: given.get(name, 0) for name in values},
        pruned=pruned,
        spare=available - sum(limits.cost_of(name) * count for name, count in given.items()),
    )
