"""rsLoRA (Kalajdzievski 2023), by PEFT: LoRA scaled by alpha over the root of its rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loralloc.methods.method import DEFAULT_RANK, About
from loralloc.methods.peft_method import LoraShaped


@dataclass(kw_only=True)
class RsLora(LoraShaped):
    """y = W x + alpha / sqrt(r) B (A x), alpha being `scale` times r.

    Where a budget chooses r, alpha is `scale` times 8 whatever r is, so that the scaling falls.
    """

    about: ClassVar[About] = About(
        name="rslora",
        title="rsLoRA",
        paper="Kalajdzievski 2023",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=5e-4,
        rate_from="LoRA's; what differs is the scaling",
        merges=True,
    )

    def fit(self, model: nn.Module, budget: int) -> None:
        """See `Method.fit`."""
        is_open = self.rank is None
        super().fit(model, budget)
        if is_open:
            assert self.rank is not None, "it was chosen now"
            self.scale *= DEFAULT_RANK / self.rank

    def lora_options(self) -> dict[str, Any]:
        """See `LoraShaped.lora_options`."""
        return {"use_rslora": True}
