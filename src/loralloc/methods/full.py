"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import About
from loralloc.methods.peft_method import PEFT_HEADS


@dataclass(kw_only=True)
class Full(InPlaceMethod):
    """All weights of the backbone, in float32.

    A backbone in bfloat16 is cast: an update of a thousandth of a weight, as AdamW makes them at
    usual learning rates, is lost when it is rounded to bfloat16's 8 bits.
    """

    about: ClassVar[About] = About(
        name="full",
        title="Full fine-tuning",
        paper="no paper: every weight trains",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=3e-5,
        rate_from="Devlin et al. 2019, the middle of three",
        differs="The backbone is cast to float32 whatever the run's `dtype`.",
        merges=True,
    )
    size: ClassVar[str] = ""

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        return sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if not name.startswith(PEFT_HEADS)
        )

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        model.float().requires_grad_(True)

    def merge(self) -> Any:
        """See `Method.merge`; the model is the backbone already."""
        return self.model
