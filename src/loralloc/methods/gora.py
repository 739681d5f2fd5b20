"""GoRA (He et al. 2025): ranks and first weights from the gradients of the frozen weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loralloc.allocation import replicas
from loralloc.allocation.layers import lora_layers, rank_cost, weight_a, weight_b
from loralloc.allocation.objective import Batch
from loralloc.allocation.resize import resize
from loralloc.methods.from_data import LoraFromData
from loralloc.methods.lora_plus import FasterB
from loralloc.methods.method import About, trainable
from loralloc.methods.session import Session
from loralloc.methods.weight_gradients import WeightGradients


@dataclass(kw_only=True)
class Gora(FasterB, LoraFromData):
    """Before the first step G = dL/dW, the mean over some batches, of every adapted layer.

    With I = mean |W * G| a layer's share of a total is I over the sum of all I; the layer has

        r = round(total * share / sqrt(in_features + out_features))

    ranks, at least `least` and at most `most` times `rank`, with the total for which the ranks fit
    the budget. A is drawn as in LoRA, and with g = `step_size`

        s B = - g sqrt(in_features / r) G A^T (A A^T)^-1

    so that the adapter begins with about a step of descent, of length g |G|. B then has `ratio`
    times the learning rate of A, as in LoRA+ and the authors' scripts.
    """

    examples: int = 1024
    """Training examples that G is of. Source: the authors' scripts, 32 steps of 32 examples."""

    step_size: float = 0.05
    """g. Source: He et al. 2025 (gamma)."""

    least: float = 0.5
    """Least rank over `rank`. Source: He et al. 2025, 4 of 8."""

    most: float = 4.0
    """Largest rank over `rank`. Source: He et al. 2025, 32 of 8."""

    about: ClassVar[About] = About(
        name="gora",
        title="GoRA",
        paper="He et al. 2025",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=5e-5,
        rate_from="the authors' script for MetaMathQA (Llama-3.1-8B); B has 16 times that",
        differs="The total is the one for which the ranks fit the budget, where the authors take "
        "what rounding gives; the scaling is LoRA's. B begins down the gradient, as in the paper "
        "and in the authors' code of commit b172003; in their commit 2f7d63c the minus is gone.",
        starts_as_base=False,
        why_not_base="It begins a step down the gradient from it.",
        merges=True,
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is out of its range.
        """
        FasterB.__post_init__(self)
        LoraFromData.__post_init__(self)
        if not 0 < self.least <= 1 <= self.most:
            raise ValueError(
                f"`least` is {self.least} and `most` {self.most}; they are ranks over `rank`, so "
                "that 0 < least <= 1 <= most."
            )
        if not self.step_size > 0:
            raise ValueError(f"`step_size` is {self.step_size}; it must be a number above 0.")

    def start(self, session: Session, batches: Sequence[Batch]) -> None:
        """See `LoraFromData.start`."""
        gradients = self._gradients(session, batches)
        layers = lora_layers(self.model)
        assert self.rank is not None, "fit() chooses it"
        ranks = allocated(
            {name: importance(_weight(layer), gradients[name]) for name, layer in layers.items()},
            {name: rank_cost(layer) for name, layer in layers.items()},
            rank=self.rank,
            least=max(1, math.floor(self.least * self.rank)),
            most=math.ceil(self.most * self.rank),
        )
        resize(self.model, ranks, optimizer=session.optimizer)
        for name, layer in lora_layers(self.model).items():
            b = weight_b(layer)
            update = compressed(gradients.pop(name).to(b.device), weight_a(layer).detach())
            b.data.copy_(-self.step_size / layer.scaling["default"] * update)

    def _gradients(self, session: Session, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """G of every layer, shape (out_features, in_features), on the CPU."""
        sums: dict[str, Tensor] = {}

        def see(name: str, gradient: Tensor) -> None:
            there = gradient.cpu()
            sums[name] = sums[name] + there if name in sums else there

        weights = list(trainable(self.model).values())
        with WeightGradients(lora_layers(self.model), see):
            for batch in batches:
                # Asked for, and not left in `.grad`: that would wake a wrapper of the model.
                torch.autograd.grad(session.loss(batch), weights, allow_unused=True)
        return replicas.averaged({name: x / len(batches) for name, x in sums.items()})


def importance(weight: Tensor, gradient: Tensor) -> float:
    """I of a layer: mean |W * G|, of two matrices of one shape."""
    return float((weight.float().cpu() * gradient.cpu()).abs().mean())


def allocated(
    importance: Mapping[str, float], costs: Mapping[str, int], *, rank: int, least: int, most: int
) -> dict[str, int]:
    """Ranks by importance, within the parameters of one rank for all.

    Args:
        importance: I of every layer.
        costs: Parameters of one of its ranks: in_features + out_features.
        rank: That whose parameters are the budget.
        least: Of every layer, at most `rank`.
        most: Of every layer, at least `rank`.
    """
    whole = sum(importance.values())
    shares = {
        name: (value / whole if whole else 1 / len(importance)) / math.sqrt(costs[name])
        for name, value in importance.items()
    }
    budget = rank * sum(costs.values())

    def with_total(total: float) -> dict[str, int]:
        return {n: min(most, max(least, round(total * share))) for n, share in shares.items()}

    low, high = 0.0, sum(rank * math.sqrt(cost) for cost in costs.values())
    while _size(with_total(high), costs) <= budget and high < 1e12:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if _size(with_total(middle), costs) <= budget:
            low = middle
        else:
            high = middle
    return with_total(low)


def compressed(gradient: Tensor, a: Tensor) -> Tensor:
    """sqrt(in_features / r) G A^T (A A^T)^-1: what r random rows can hold of G, at its length.

    Args:
        gradient: G, shape (out_features, in_features).
        a: A, shape (r, in_features).
    """
    rows = a.double()
    # (A A^T) B^T = A G^T, for A A^T is symmetric.
    solution: Tensor = torch.linalg.solve(rows @ rows.T, rows @ gradient.double().T).T
    return math.sqrt(rows.shape[1] / len(rows)) * solution


def _size(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    return sum(rank * costs[name] for name, rank in ranks.items())


def _weight(layer: LoraLayer) -> Any:
    """W as (out_features, in_features)."""
    weight = layer.get_base_layer().weight.detach()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
