"""PiSSA (Meng et al. 2024), by PEFT: what trains is the principal part of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from loralloc.methods.method import About
from loralloc.methods.peft_method import FixedRanks


@dataclass(kw_only=True)
class Pissa(FixedRanks):
    """With W = U S V^T, s B A is at the start the part of the r largest singular values.

    B is U sqrt(S / s) and A sqrt(S / s) V^T of that part, and the frozen weight is what is left of
    W. Whoever opens the adapter takes the weight apart once more, as PEFT does by itself; that is
    why the decomposition is a full one, and not the faster one, which draws random numbers.
    """

    scale: float = 1.0
    """Source: the authors' scripts, alpha as large as the rank."""

    about: ClassVar[About] = About(
        name="pissa",
        title="PiSSA",
        paper="Meng et al. 2024",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=2e-5,
        rate_from="the authors' script for MetaMathQA (LLaMA-2-7B)",
        keeps_backbone=False,
        merges=True,
    )

    def lora_options(self) -> dict[str, Any]:
        """See `LoraShaped.lora_options`."""
        return {"init_lora_weights": "pissa"}
