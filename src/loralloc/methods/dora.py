"""DoRA (Liu et al. 2024), by PEFT: LoRA on the direction of a weight, and its magnitude apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loralloc.methods.method import About
from loralloc.methods.peft_method import FixedRanks, targeted_shapes


@dataclass(kw_only=True)
class Dora(FixedRanks):
    """y = m (W + s B A) x / ||W + s B A||, row by row; m is ||W|| at the start, and trains."""

    about: ClassVar[About] = About(
        name="dora",
        title="DoRA",
        paper="Liu et al. 2024 (DoRA)",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=2e-4,
        rate_from="the authors' script for commonsense reasoning (LLaMA-2-7B)",
        merges=True,
    )

    def lora_options(self) -> dict[str, Any]:
        """See `LoraShaped.lora_options`."""
        return {"use_dora": True}

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`: the magnitudes are one for every output."""
        shapes = targeted_shapes(model, self.targeted(model)).values()
        return sum(size * (inputs + outputs) + outputs for inputs, outputs in shapes)
