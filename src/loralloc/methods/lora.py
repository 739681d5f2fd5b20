"""LoRA (Hu et al. 2021), by PEFT: the same rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from loralloc.methods.expert_parameters import adapted_parameters
from loralloc.methods.method import About
from loralloc.methods.peft_method import LoraShaped, PeftMethod

CONTROL = About(
    name="",
    title="",
    paper="no paper: a control",
    status="control",
    initialisation="published",
    settings="published",
    learning_rate=5e-4,
    rate_from="LoRA's, which it is",
    merges=True,
)
"""What controls that train as LoRA does have in common; each adds its own name."""


@dataclass(kw_only=True)
class Lora(LoraShaped):
    """y = W x + s B (A x), with A Kaiming-uniform and B zero at the start."""

    parameters: Sequence[str] | str | None = None
    """Parameters to adapt beside modules, as PEFT's `target_parameters`: a mixture's experts, and
    its routers. A rank of experts that are one parameter is one of each."""

    use_rslora: bool = False
    """Whether the scaling is alpha / sqrt(r), as PEFT's `use_rslora`."""

    use_dora: bool = False
    """Whether magnitude and direction train apart, as PEFT's `use_dora`; such ranks cannot move."""

    about: ClassVar[About] = About(
        name="lora",
        title="LoRA",
        paper="Hu et al. 2021",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=5e-4,
        rate_from="Hu et al. 2021, Table 9 (RoBERTa-base on SST-2)",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

    def rank_cost(self, model: nn.Module) -> int:
        """See `LoraShaped.rank_cost`: with the parameters, whose names are checked."""
        named = adapted_parameters(model, self.parameters) if self.parameters else {}
        return super().rank_cost(model) + sum(named.values())

    def lora_options(self) -> dict[str, Any]:
        """See `LoraShaped.lora_options`.

        Raises:
            ValueError: There are options that PEFT does not have for parameters.
        """
        options = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        if not self.parameters:
            return options
        for flag, value in (("lora_dropout", self.dropout), ("use_dora", self.use_dora)):
            if value:
                raise ValueError(
                    f"`{flag}` is {value}, which PEFT does not have for parameters "
                    "(`lora_target_parameters`); leave out one of the two."
                )
        names = [self.parameters] if isinstance(self.parameters, str) else list(self.parameters)
        return {**options, "target_parameters": names}

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        if self.use_dora:  # its ranks cannot be changed, and need not be
            PeftMethod.load(self, folder)
        else:
            super().load(folder)
