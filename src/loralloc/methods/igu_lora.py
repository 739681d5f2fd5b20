"""IGU-LoRA (Cui et al. 2026): triplets pruned by gradients along the path from the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig, TaskType
from torch import Tensor

from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.policy import Plan
from loralloc.methods.factored import TripletLora
from loralloc.methods.gated import START, keep_highest
from loralloc.methods.method import About
from loralloc.methods.session import Session
from loralloc.methods.triplet_sensitivity import TripletSensitivity

NODES = 20
"""Points of the path, of which each step takes one. Source: the authors' code."""

EPSILON = 1e-6


class PathSensitivity(TripletSensitivity):
    """s(w) = (Ibar + epsilon) / (Ubar + epsilon): large where the mean is, and is certain."""

    def element_score(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """See `Sensitivity.element_score`."""
        return (mean + EPSILON) / (deviation + EPSILON)


@dataclass(kw_only=True)
class IguLora(TripletLora):
    """y = W x + s B (e * (A x)), A and B normal with standard deviation 0.02, e = 0.1 at the start.

    Until the budget is reached each step draws a point a of 1/20, 2/20, ..., 1 and trains with a A,
    a e and a B in the place of A, e and B, so that I = |w dL/dw| is over the steps the integrated
    gradient of w along the path from the base model, up to sign. With means Ibar and Ubar as in
    AdaLoRA, s(w) = Ibar / Ubar; a triplet's score is s(e_i) + mean_j s(A_ij) + mean_j s(B_ji).
    Every `interval` of the run the e of the least triplets become zero, as many as leave

        b_T + (b_0 - b_T) (1 - p)^3

    parameters, with p from 0 at `warmup_share` to 1 at `final_share` before the end. A triplet may
    come back until then. The loss gains the mean over all A and B of ||A A^T - diag(A A^T)||_F.
    """

    orthogonality: float = 1.0
    """Weight of that mean."""

    warmup_share: float = 0.01
    """Share of the run before the first round. Source: the authors' script for SST-2."""

    final_share: float = 0.57
    """Share of the run after the budget is reached. Source: the same."""

    interval: float = 0.005
    """Share of the run between two rounds. Source: the same."""

    about: ClassVar[About] = About(
        name="igu-lora",
        title="IGU-LoRA",
        paper="Cui et al. 2026",
        status="port",
        initialisation="published",
        settings="published",
        learning_rate=2e-4,
        rate_from="the authors' script for SST-2 (LLaMA-2-7B)",
        differs="The authors train what is left anew, in a second run: here it trains on, without "
        "the path, and the second run is `pattern` on the first one's folder. The scaling is the "
        "run's, far above theirs of 1/r. A step that accumulates batches has one point for all of "
        "them, and gradients of the factors are not clipped with the others.",
        starts_as_base=False,
        why_not_base="e begins at 0.1, and neither A nor B at zero.",
        merges=True,
    )
    factor_at_start: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        """Check the shares.

        Raises:
            ValueError: One is not between 0 and 1.
        """
        for name in ("warmup_share", "final_share", "interval"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(
                    f"`{name}` is {share}; it is a share of the run, from 0 to less than 1."
                )

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        return self.lora_config(model, START * self.rank, task_type=task_type, heads=heads)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        self.sensitivity = PathSensitivity(self.model, self.factors)
        self.point = 1.0
        """a of this step."""
        return self.model

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: The run is too short for the schedule.
        """
        super().begin(session)
        num_steps = session.num_steps
        self.first = round(self.warmup_share * num_steps)
        self.last = num_steps - round(self.final_share * num_steps)
        self.every = max(1, round(self.interval * num_steps))
        if self.last - self.first < 2:
            raise ValueError(
                f"Of the run's {num_steps} steps igu-lora prunes between step {self.first} and "
                f"step {self.last}, which is too few; train for longer, or lower `warmup_share` or "
                "`final_share`."
            )

    def before_step(self) -> None:
        """See `Method.before_step`: draw a, by the seed and the number of the step."""
        if self.is_factored:
            seed = self.session.seed * 1_000_003 + self.session.steps_done
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(1, NODES + 1, (), generator=generator, device="cpu")
            self.point = int(drawn) / NODES

    def factor(self, name: str) -> Tensor:
        """See `FactoredLora.factor`: the product of a A, a e and a B has a^3."""
        scale = self.point**3 if self.model.training else 1.0
        return scale * self.factors[name]

    def observe(self, number: int) -> None:
        """See `FactoredLora.observe`."""
        self.sensitivity.observe()

    def allocate(self, number: int) -> None:
        """See `FactoredLora.allocate`."""
        if number < self.last and (number <= self.first or number % self.every):
            return
        costs = self.costs()
        lengths = [len(factor) for factor in self.factors.values()]
        each = torch.tensor([costs[n] for n in self.factors]).repeat_interleave(
            torch.tensor(lengths)
        )
        importance = torch.cat(list(self.sensitivity.score().importance.values()))
        kept = keep_highest(importance, each, self._budget(number, int(each.sum())))
        parts = dict(zip(self.factors, torch.split(kept, lengths), strict=True))
        with torch.no_grad():
            for name, part in parts.items():
                self.factors[name][~part.to(self.factors[name].device)] = 0
        if number >= self.last:
            self._drop(parts)

    def _budget(self, number: int, start: int) -> int:
        """Parameters that may be left after this step."""
        end = start // START
        left = max(0.0, 1 - (number - self.first) / (self.last - self.first))
        return int(end + (start - end) * left**3)

    def _drop(self, parts: dict[str, Tensor]) -> None:
        """Leave plain LoRA of the triplets that are kept."""
        plan = Plan(
            kept={name: tuple(part.nonzero().flatten().tolist()) for name, part in parts.items()},
            added=dict.fromkeys(parts, 0),
            pruned={
                name: tuple((~part).nonzero().flatten().tolist())
                for name, part in parts.items()
                if not part.all()
            },
        )
        self.move(plan, new=0.0)
        self.fold()
        self.sensitivity.finish()

    def extra_loss(self) -> Tensor | None:
        """See `Method.extra_loss`."""
        if not self.is_factored or not self.orthogonality:
            return None
        distances = [
            off_diagonal(rows)
            for a, b in weights_ab(lora_layers(self.model)).values()
            for rows in (a, b.T)
        ]
        return self.orthogonality * torch.stack(distances).mean()

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`: the budget is reached."""
        return self.last

    def finish(self) -> None:
        """See `Method.finish`."""
        if self.is_factored:
            raise RuntimeError(
                f"igu-lora reaches its budget at step {self.last}, and the run ended before, with "
                "more ranks than that; train until then, or raise `final_share`."
            )

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {**super().state(), "sensitivity": self.sensitivity.state()}

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        super().load_state(state)
        self.sensitivity.factors = self.factors
        if state["sensitivity"]:
            self.sensitivity.load_state(state["sensitivity"])


def off_diagonal(rows: Tensor) -> Tensor:
    """||R R^T - diag(R R^T)||_F, a scalar, of R with shape (num_rows, width)."""
    products = rows @ rows.T
    distance: Tensor = torch.linalg.matrix_norm(products - products.diagonal().diag())
    return distance
