"""ALoRA-Sensi: AdaLoRA's sensitivity, averaged over the training steps.

Of every element w of A and B and every gate g (which is 1), each step gives I = |w dL/dw|, and

    Ibar <- b1 Ibar + (1 - b1) I          Ubar <- b2 Ubar + (1 - b2) |I - Ibar|

with s(w) = Ibar Ubar (Zhang et al. 2023, AdaLoRA). The importance of rank i is s(g_i) + mean_j
s(A_ij) + mean_j s(B_ji) (Liu et al. 2024, Appendix F), where dL/dg_i = <B_i, dL/dB_i>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralloc.allocation.experts import over_ranks, ranked, ranks_followed_by
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import experts_of, lora_layers, weight_a, weight_b
from loralloc.allocation.policy import Plan, Scores
from loralloc.allocation.transfers import to_cpu

BETA_1 = 0.85
"""Share of the old mean of I in the new (b1). Source: AdaLoRA."""

BETA_2 = 0.85
"""Share of the old mean deviation in the new (b2). Source: AdaLoRA."""

RANK_DIM = {"gate": 0, "row": 0, "column": 1}
"""What a rank consists of, and the dimension of its ranks: g (num_ranks,), A (num_ranks,
in_features), B (out_features, num_ranks)."""


class Sensitivity(Tracker):
    """The means Ibar and Ubar of every element of a LoRA adapter: twice its size, in float32.

    As in AdaLoRA's code there is no correction for the zeros that they begin with, and I is taken
    after the optimiser's step: of the new w and the gradient that it was changed by, which is that
    of the whole step, over all its micro-batches and, where the run clips gradients, clipped.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(self, model: nn.Module, *, adapter_name: str = "default") -> None:
        self._model, self._adapter_name = model, adapter_name
        self._mean: dict[tuple[str, str], Tensor] = {}
        self._deviation: dict[tuple[str, str], Tensor] = {}
        self._experts = experts_of(lora_layers(model, adapter_name))

    @torch.no_grad()
    def observe(self) -> None:
        """Bring the means up to date with a step's gradients.

        Raises:
            RuntimeError: There are none.
        """
        seen = self._seen()
        if not self._mean:
            self._mean = {key: torch.zeros_like(value) for key, value in seen.items()}
            self._deviation = {key: torch.zeros_like(value) for key, value in seen.items()}
        values = list(seen.values())
        mean, deviation = ([of[key] for key in seen] for of in (self._mean, self._deviation))
        torch._foreach_lerp_(mean, values, 1 - BETA_1)
        torch._foreach_sub_(values, mean)
        torch._foreach_abs_(values)
        torch._foreach_lerp_(deviation, values, 1 - BETA_2)

    def score(self) -> Scores:
        """See `Tracker.score`: three terms, "gate", "row" (of A) and "column" (of B)."""
        if not self._mean:
            raise RuntimeError(
                "No training step was observed, so sensitivity is not known; call `observe` after "
                "every optimizer.step(), before gradients are cleared."
            )
        terms: dict[str, dict[str, Tensor]] = {part: {} for part in RANK_DIM}
        for (name, part), mean in self._mean.items():
            value = self.element_score(mean, self._deviation[name, part])
            if value.ndim == 2:
                value, at = ranked(value, self._experts.get(name, 1), dim=RANK_DIM[part])
                value = value.mean(dim=[dim for dim in range(value.ndim) if dim != at])
            terms[part][name] = value
        return Scores(
            terms={part: to_cpu(by_module) for part, by_module in terms.items()}, settled=False
        )

    def element_score(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """s(w) of elements, from Ibar and Ubar."""
        return mean * deviation

    def follow(self, plan: Plan, *, optimizer: Optimizer | None) -> None:
        """See `Tracker.follow`."""
        for means in (self._mean, self._deviation):
            for name, part in list(means):
                kept, added = plan.kept[name], plan.added[name]
                value = means.pop((name, part))
                if kept or added:
                    experts = self._experts.get(name, 1) if value.ndim == 2 else 1
                    means[name, part] = _carried(value, kept, added, experts, dim=RANK_DIM[part])

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self._mean, self._deviation = {}, {}

    def state(self) -> dict[str, Tensor]:
        """See `Tracker.state`."""
        both = {"mean": self._mean, "deviation": self._deviation}
        return {
            f"{name}.{part}.{kind}": value.contiguous()
            for kind, means in both.items()
            for (name, part), value in means.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Tracker.load_state`."""
        means: dict[str, dict[tuple[str, str], Tensor]] = {"mean": {}, "deviation": {}}
        layers = lora_layers(self._model, self._adapter_name)
        for name, layer in layers.items():
            b, rank = weight_b(layer, self._adapter_name), int(layer.r[self._adapter_name])
            shapes = {
                "gate": (rank,),
                "row": weight_a(layer, self._adapter_name).shape,
                "column": b.shape,
            }
            for part, shape in shapes.items():
                for kind, of in means.items():
                    value = state.get(f"{name}.{part}.{kind}")
                    if value is None or value.shape != shape:
                        raise ValueError(
                            f"The sensitivity of {name} is not that of a module with {rank} ranks; "
                            "restore the adapter of the same checkpoint first."
                        )
                    of[name, part] = value.to(b.device)
        self._mean, self._deviation = means["mean"], means["deviation"]

    def _seen(self) -> dict[tuple[str, str], Tensor]:
        """I of every element, in model order."""
        weights, gradients, keys = [], [], []
        for name, layer in lora_layers(self._model, self._adapter_name).items():
            for part, weight in (
                ("row", weight_a(layer, self._adapter_name)),
                ("column", weight_b(layer, self._adapter_name)),
            ):
                keys.append((name, part))
                weights.append(weight.detach().float())
                gradients.append(weight.grad)
        if not any(gradient is not None for gradient in gradients):
            raise RuntimeError(
                "No LoRA weight has a gradient, so its sensitivity cannot be observed; call "
                "`observe` after optimizer.step() and before gradients are cleared."
            )
        # A module that a step did not use was not sensitive in it.
        given = [
            torch.zeros_like(weight) if gradient is None else gradient.float()
            for weight, gradient in zip(weights, gradients, strict=True)
        ]
        products = dict(zip(keys, torch._foreach_mul(weights, given), strict=True))
        gates = {
            (name, "gate"): over_ranks(product.sum(dim=0), self._experts.get(name, 1))
            for (name, part), product in products.items()
            if part == "column"
        }
        seen = {**products, **gates}
        torch._foreach_abs_(list(seen.values()))
        return seen


def _carried(
    value: Tensor, kept: Sequence[int], num_added: int, experts: int, *, dim: int
) -> Tensor:
    """The slices of the kept ranks along `dim`, then zeros for the new ranks."""
    shape = list(value.shape)
    shape[dim] = num_added * experts
    return ranks_followed_by(kept, value, value.new_zeros(shape), experts, dim=dim)
