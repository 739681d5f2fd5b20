"""LoRA (Hu et al. 2021), by PEFT: the same rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig, TaskType

from loralloc.methods.method import About
from loralloc.methods.peft_method import LoraShaped


@dataclass(kw_only=True)
class Lora(LoraShaped):
    """y = W x + s B (A x), with A Kaiming-uniform and B zero at the start."""

    use_rslora: bool = False
    use_dora: bool = False

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

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        return self.lora_config(
            model,
            self.rank,
            task_type=task_type,
            heads=heads,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
