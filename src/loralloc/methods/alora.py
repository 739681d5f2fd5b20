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
        """See `Method.allocation`.

        Raises:
            ValueError: The options ask for another score.
        """
        if config.score not in (AllocationConfig.score, self.score):
            raise ValueError(
                f"`score` is {config.score!r}, but {self.about.name} is ALoRA with `score` of "
                f"{self.score!r}; leave it out, or use alora."
            )
        return dataclasses.replace(config, score=self.score)


@dataclass(kw_only=True)
class AloraDnas(_Variant):
    """Importance is the gate's value, learned as in DARTS."""

    about: ClassVar[About] = About(
        name="alora-dnas",
        title="ALoRA-DNAS",
        paper="Liu et al. 2024, Appendix F",
        status="reconstruction",
        differs="The paper leaves open when and by which optimiser gates are updated, and what "
        "becomes of them at a round: DARTS's first order and Adam are taken, and gates go into B.",
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
        differs="How a rank's elements are put together is AdaLoRA's rule, with the gate, which is "
        "always 1, in the place of the singular value.",
        merges=True,
    )
    score: ClassVar[Literal["architecture", "sensitivity"]] = "sensitivity"
