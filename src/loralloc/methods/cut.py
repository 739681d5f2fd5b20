"""LoRA that trains with twice its ranks and is cut to its budget once: then it is plain LoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, TaskType
from torch.optim import Optimizer

from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab
from loralloc.allocation.optimizer_state import check_optimizer
from loralloc.methods.peft_method import LoraShaped
from loralloc.methods.session import Session

START = 2
"""Ranks at the start over ranks at the end, on average."""


@dataclass(kw_only=True)
class CutLora(LoraShaped):
    """y = W x + s B (A x), with twice the ranks until the cut."""

    cut_by: float = 0.6
    """Share of the run after which it is cut, above 0; 1 cuts what has trained and trains no
    more."""

    def bears_scaled_loss(self) -> bool:
        """See `Method.bears_scaled_loss`."""
        return True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: It would never be cut.
        """
        if not 0 < self.cut_by <= 1:
            raise ValueError(
                f"`cut_by` is {self.cut_by}; it is a share of the run, above 0 and at most 1."
            )

    @abstractmethod
    def cut(self, optimizer: Optimizer) -> None:
        """Bring the adapter down to `budget` parameters, and the optimiser with it."""

    @property
    def budget(self) -> int:
        """Parameters after the cut."""
        assert self.rank is not None, "fit() chooses it"
        return self.rank * sum(map(rank_cost, lora_layers(self.model).values()))

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        return self.lora_config(model, START * self.rank, task_type=task_type, heads=heads)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        self.is_cut = False
        return super().prepare(model, task_type=task_type, heads=heads)

    def join(self, session: Session) -> None:
        """See `Method.join`."""
        self.session = session

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """See `Method.check_optimizer`."""
        check_optimizer(optimizer, weights_ab(lora_layers(self.model)))

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            TypeError: Ranks cannot be dropped under the optimiser.
        """
        self.check_optimizer(session.optimizer)
        self.session = session

    @property
    def cut_step(self) -> int:
        """The step after which it is cut."""
        return max(1, round(self.cut_by * self.session.num_steps))

    def after_step(self, number: int, epoch: float) -> bool:
        """See `Method.after_step`: the cut, where it is due."""
        if self.is_cut or number < self.cut_step:
            return False
        self.cut(self.session.optimizer)
        self.is_cut = True
        return True

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return self.cut_step

    def finish(self) -> None:
        """See `Method.finish`."""
        if not self.is_cut:
            raise RuntimeError(
                f"{self.about.name} is cut to its budget after step {self.cut_step}, and the run "
                "ended before, with twice its ranks; train until then, or lower `cut_by`."
            )

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        return {"is_cut": self.is_cut}

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        self.is_cut = bool(state["is_cut"])
