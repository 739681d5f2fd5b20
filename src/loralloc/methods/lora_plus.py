"""LoRA+ (Hayou et al. 2024), as PEFT has it: B learns faster than A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer

from loralloc.methods.method import About
from loralloc.methods.peft_method import LoraShaped
from loralloc.methods.session import Session


@dataclass(kw_only=True)
class FasterB(LoraShaped):
    """LoRA whose B, and vectors such as a head's bias, have `ratio` times the learning rate.

    The grouping is that of PEFT's `create_loraplus_optimizer`; all else of the run's optimiser,
    weight decay among it, stays.
    """

    ratio: float = 16.0
    """Learning rate of B over that of A, at least 1. Source: Hayou et al. 2024."""

    def __post_init__(self) -> None:
        """Check the ratio.

        Raises:
            ValueError: It is less than 1.
        """
        if not self.ratio >= 1:
            raise ValueError(f"`ratio` is {self.ratio}; it must be a number of at least 1.")

    def join(self, session: Session) -> None:
        """See `Method.join`.

        Raises:
            ValueError: The optimiser is there already, with learning rates of its own.
        """
        if session.optimizer is not None:
            raise ValueError(
                f"The trainer has an optimiser already, and {self.about.name} gives B a learning "
                "rate of its own when the optimiser is made; leave out `optimizers`."
            )

    def arrange(self, optimizer: Optimizer) -> None:
        """See `Method.arrange`."""
        faster = {
            id(parameter)
            for name, parameter in self.model.named_parameters()
            if "lora_B" in name or parameter.ndim == 1
        }
        groups = []
        for group in optimizer.param_groups:
            for is_fast, rate in ((False, group["lr"]), (True, self.ratio * group["lr"])):
                params = [p for p in group["params"] if (id(p) in faster) == is_fast]
                if params:
                    groups.append({**group, "params": params, "lr": rate})
        optimizer.param_groups[:] = groups


@dataclass(kw_only=True)
class LoraPlus(FasterB):
    """LoRA with a faster B, and nothing else changed."""

    about: ClassVar[About] = About(
        name="lora-plus",
        title="LoRA+",
        paper="Hayou et al. 2024",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=2.5e-4,
        rate_from="half of LoRA's, as PEFT advises beside a ratio of this size",
        merges=True,
    )
