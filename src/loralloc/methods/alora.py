"""ALoRA (Liu et al. 2024) and its two ablation variants: LoRA whose ranks move while it trains.

The rounds are `allocation`'s, and a run drives them with `attach`, as any user of a trainer does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.lora import Lora
from loralloc.methods.method import About


@dataclass(kw_only=True)
class Alora(Lora):
    """Importance by ablating single ranks (AB-LoRA)."""

    about: ClassVar[About] = About(
        name="alora", title="ALoRA", paper="Liu et al. 2024", status="faithful", merges=True
    )
    allocates: ClassVar[bool] = True

    def allocation(self, config: AllocationConfig) -> AllocationConfig | None:
        """See `Method.allocation`."""
        return config


class _Variant(Alora):
    """ALoRA with one other score."""

    score: ClassVar[Literal["architecture", "sensitivity"]]

    def allocation(self, config: AllocationConfig) -> AllocationConfig | None:
        """See `Method.allocation`."""
        return dataclasses.replace(config, score=self.score)


@dataclass(kw_only=True)
class AloraDnas(_Variant):
    """Importance is the gate's value, learned as in DARTS."""

    about: ClassVar[About] = About(
        name="alora-dnas",
        title="ALoRA-DNAS",
        paper="Liu et al. 2024, Appendix F",
        status="reconstruction",
        differs="Schedule, optimiser of the gates and their folding at a round are not in the "
        "paper: DARTS's are taken, to first order.",
        merges=True,
    )
    score: ClassVar[Literal["architecture", "sensitivity"]] = "architecture"


@dataclass(kw_only=True)
class AloraSensi(_Variant):
    """Importance is AdaLoRA's sensitivity."""

    about: ClassVar[About] = About(
        name="alora-sensi",
        title="ALoRA-Sensi",
        paper="Liu et al. 2024, Appendix F",
        status="reconstruction",
        differs="How a rank's elements are put together is AdaLoRA's rule, with the gradient of "
        "the gate in the place of the singular value's.",
        merges=True,
    )
    score: ClassVar[Literal["architecture", "sensitivity"]] = "sensitivity"
