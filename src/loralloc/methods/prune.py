"""A control: LoRA of twice the ranks, of which AB-LoRA (Liu et al. 2024) prunes half at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from loralloc.allocation import replicas
from loralloc.allocation.choices import check_scores, is_gathered, measured_by
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_b
from loralloc.allocation.policy import Limits, Plan, Scores
from loralloc.allocation.refusals import ScoringError
from loralloc.allocation.resize import resize
from loralloc.methods.cut import CutLora
from loralloc.methods.gated import keep_highest
from loralloc.methods.method import About
from loralloc.methods.session import Length, Wants


@dataclass(kw_only=True)
class Prune(CutLora):
    """The ranks of the lowest importance go, whatever their module, until the others fit."""

    score: str = "gradient"
    """How importance is measured, as `score` of an allocation: one that is measured at a round."""

    scoring_examples: int = 32
    """Held-out examples that it is measured on."""

    about: ClassVar[About] = About(
        name="prune",
        title="LoRA, pruned",
        paper="no paper: a control",
        status="control",
        initialisation="published",
        settings="ours",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is before and after",
        differs="ALoRA's score without its rounds: nothing is given, and what went does not come "
        "back.",
        merges=True,
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The score is not measured at a round.
        """
        super().__post_init__()
        if is_gathered(self._config):
            raise ValueError(
                f"`score` is {self.score!r}, which is gathered while the adapter trains, and prune "
                "measures once; use one of 'gradient', 'screened', 'ablation', 'shapley'."
            )

    @property
    def _config(self) -> AllocationConfig:
        return AllocationConfig(score=self.score, scoring_examples=self.scoring_examples)

    def wants(self, length: Length) -> Wants:
        """See `Method.wants`."""
        return Wants(held_out=self.scoring_examples)

    def cut(self, optimizer: Optimizer) -> None:
        """See `CutLora.cut`.

        Raises:
            ScoringError: Importance is not finite. Nothing was changed.
        """
        layers = lora_layers(self.model)
        costs = {name: rank_cost(layer) for name, layer in layers.items()}
        budget = self.budget

        def fitting(scores: Scores, limits: Limits, /) -> Plan:
            return keep_what_fits(scores, costs, budget)

        now = ranks(layers)
        limits = Limits(num_pruned=sum(now.values()) // 2, cost=costs)
        measure = measured_by(self._config, fitting)
        assert self.session.objective is not None, "a run gives held-out examples"
        scores = replicas.mean(
            check_scores(
                measure(self.session.objective, weights_b(layers), limits), now, self._config
            )
        )
        if not scores.is_finite():
            raise ScoringError(
                f"The adapter could not be pruned at step {self.session.steps_done}, since "
                "importance is not finite; lower the learning rate or check the data."
            )
        resize(self.model, fitting(scores, limits), optimizer=optimizer)


def keep_what_fits(scores: Scores, costs: Mapping[str, int], budget: int) -> Plan:
    """Drop the ranks of the lowest importance one by one until the others fit the budget.

    Args:
        scores: Importance of every rank.
        costs: Parameters of one rank of each module.
        budget: Parameters that the kept ranks may have together.
    """
    importance = scores.importance
    lengths = [len(values) for values in importance.values()]
    each = torch.tensor([costs[name] for name in importance]).repeat_interleave(
        torch.tensor(lengths)
    )
    kept = keep_highest(torch.cat([x.cpu() for x in importance.values()]), each, budget)
    by_module = dict(zip(importance, torch.split(kept, lengths), strict=True))
    return Plan(
        kept={name: _where(keep) for name, keep in by_module.items()},
        added=dict.fromkeys(by_module, 0),
        pruned={name: _where(~keep) for name, keep in by_module.items() if not keep.all()},
    )


def _where(which: Any) -> tuple[int, ...]:
    return tuple(which.nonzero().flatten().tolist())
