"""The two ablation variants of ALoRA (Liu et al. 2024, Appendix F): each has one other score."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.alora import Alora
from loralloc.methods.method import About


class _Variant(Alora):
    """ALoRA with one other score."""

    score: ClassVar[Literal["architecture", "sensitivity"]]

    def __post_init__(self) -> None:
        """Take the variant's score.

        Raises:
            ValueError: The options ask for another score, or for shrinking.
        """
        super().__post_init__()
        given = self.allocation.score
        if given not in (AllocationConfig.score, self.score):
            raise ValueError(
                f"`score` is {given!r}, but {self.about.name} is ALoRA with `score` of "
                f"{self.score!r}; leave it out, or use alora."
            )
        self.allocation = dataclasses.replace(self.allocation, score=self.score)


@dataclass(kw_only=True)
class AloraDnas(_Variant):
    """Importance is the gate's value, learned as in DARTS."""

    about: ClassVar[About] = About(
        name="alora-dnas",
        title="ALoRA-DNAS",
        paper="Liu et al. 2024, Appendix F",
        status="reconstruction",
        initialisation="published",
        settings="ours",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is between rounds",
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
        initialisation="published",
        settings="published",
        learning_rate=5e-4,
        rate_from="LoRA's, which it is between rounds",
        differs="How a rank's elements are put together is AdaLoRA's rule, with the gate, which is "
        "always 1, in the place of the singular value.",
        merges=True,
    )
    score: ClassVar[Literal["architecture", "sensitivity"]] = "sensitivity"
