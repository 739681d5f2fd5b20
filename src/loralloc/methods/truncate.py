"""LoRA of twice the ranks, cut by its singular values (LoRA-Squeeze, Vulić et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.optim import Optimizer

from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize
from loralloc.allocation.singular import singular_form
from loralloc.methods.cut import CutLora
from loralloc.methods.gated import keep_highest
from loralloc.methods.method import About
from loralloc.methods.optimizer import train_what_is_left


@dataclass(kw_only=True)
class Truncate(CutLora):
    """With s B A = U S V^T, the part of the largest singular values stays, of each or of all.

    B becomes U sqrt(S / s) and A sqrt(S / s) V^T of what stays: directions that the optimiser has
    not seen, so that it begins anew with them.
    """

    over: Literal["module", "all"] = "module"
    """"module" leaves every module as many ranks, "all" the largest singular values of all modules
    that fit the budget together."""

    about: ClassVar[About] = About(
        name="truncate",
        title="LoRA, truncated",
        paper="Vulić et al. 2026 (LoRA-Squeeze)",
        status="port",
        initialisation="published",
        settings="ours",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is before and after",
        differs="Cut once at `cut_by` rather than step by step, and trained on from there; as an "
        "option over all modules together, which the paper has not.",
        merges=True,
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: `over` is neither.
        """
        super().__post_init__()
        if self.over not in ("module", "all"):
            raise ValueError(f"`over` is {self.over!r}; use 'module' or 'all'.")

    @torch.no_grad()
    def cut(self, optimizer: Optimizer) -> None:
        """See `CutLora.cut`."""
        layers = lora_layers(self.model)
        values = {}
        for name, layer in layers.items():
            a, b = weights_ab({name: layer})[name]
            new_b, new_a, found = singular_form(b, a)
            a.copy_(new_a)
            b.copy_(new_b)
            values[name] = found.cpu()  # over s, which is the same for all modules
        lengths = [len(found) for found in values.values()]
        if self.over == "module":
            assert self.rank is not None, "fit() chooses it"
            numbers = [min(self.rank, length) for length in lengths]
        else:
            costs = torch.tensor([rank_cost(layer) for layer in layers.values()])
            each = costs.repeat_interleave(torch.tensor(lengths))
            kept = keep_highest(torch.cat(list(values.values())), each, self.budget)
            numbers = [int(part.sum()) for part in torch.split(kept, lengths)]
        plan = Plan(
            kept={name: tuple(range(n)) for name, n in zip(values, numbers, strict=True)},
            added=dict.fromkeys(values, 0),
            pruned={
                name: tuple(range(n, length))
                for name, n, length in zip(values, numbers, lengths, strict=True)
                if n < length
            },
        )
        resize(self.model, plan, optimizer=optimizer)
        left = weights_ab(lora_layers(self.model)).values()
        train_what_is_left(optimizer, self.model, anew=[w for pair in left for w in pair])
