"""LoRA that begins with twice its ranks and a gate on each, and prunes half: then it is plain LoRA.

The gates are one vector outside the model, so that what is saved is stock PEFT LoRA at any time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from loralloc.allocation.gates import fold_gates, gate_ranks
from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab, weights_b
from loralloc.allocation.optimizer_state import check_optimizer
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize
from loralloc.methods.peft_method import LoraShaped
from loralloc.methods.session import Session

START = 2
"""Ranks at the start over ranks at the end, on average (the paper's comparison)."""


@dataclass(kw_only=True)
class GatedLora(LoraShaped):
    """y = W x + s B (g * (A x)), with A Kaiming-uniform and B zero at the start.

    When the budget is due, the ranks of lowest importance are dropped, whatever their module, until
    the others fit it in parameters; the gates of those go into B.
    """

    prune_by: float = 0.6
    """Share of the run by whose end the budget is reached."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The budget would never be reached.
        """
        if not 0 < self.prune_by <= 1:
            raise ValueError(
                f"`prune_by` is {self.prune_by}; it is a share of the run, above 0 and at most 1."
            )

    @abstractmethod
    def first_gates(self, num_gates: int) -> Tensor:
        """What is learned of the gates, at the start: shape (num_gates,)."""

    @abstractmethod
    def gate(self, where: slice) -> Tensor:
        """What multiplies some of the ranks in a forward pass."""

    @abstractmethod
    def final_gates(self) -> Tensor:
        """What multiplies every rank in evaluation, without a graph."""

    @abstractmethod
    def importance(self) -> Tensor:
        """By what ranks are kept."""

    @abstractmethod
    def gate_optimizer(self) -> Optimizer:
        """Trains `learned`."""

    def update_gates(self) -> None:
        """Take the optimiser's step of what is learned."""
        self._optimizer.step()

    def is_due(self, number: int) -> bool:
        """Whether to prune after this step, before the last at which it has to be."""
        return False

    def told_by_gates(self, kept: Tensor) -> dict[str, float]:
        """What to tell of the gates just before all ranks but these (True) are dropped."""
        return {}

    def findings(self) -> dict[str, float]:
        """See `Method.findings`."""
        return dict(self.found)

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        return self.lora_config(model, START * self.rank, task_type=task_type, heads=heads)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        costs: list[int] = []
        self.where: dict[str, slice] = {}
        for name, layer in lora_layers(self.model).items():
            start, num_ranks = len(costs), int(layer.r["default"])
            self.where[name] = slice(start, start + num_ranks)
            costs += [rank_cost(layer)] * num_ranks
        self.costs = torch.tensor(costs, device="cpu")
        self.budget = sum(costs) // START
        self.gates = self.first_gates(len(costs)).requires_grad_()
        self.learned = [self.gates]
        self.num_steps_done = 0
        self.budget_step: int | None = None
        """The step after which it became plain LoRA."""
        self.found: dict[str, float] = {}
        """What there is to tell of its gates, once they are gone."""
        self._handles: list[RemovableHandle] = []
        self._moments: list[dict[str, Any]] = []
        self._put_gates()
        return self.model

    @property
    def is_gated(self) -> bool:
        """Whether the gates are still there."""
        return bool(self._handles)

    @property
    def initial_ranks(self) -> dict[str, int]:
        """The ranks that the gates of every module began with, in the model's order."""
        return {name: where.stop - where.start for name, where in self.where.items()}

    def beside(self) -> dict[str, Tensor]:
        """See `Method.beside`."""
        if not self.is_gated:
            return {}
        return {f"gates {i}": tensor for i, tensor in enumerate(self.learned)}

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
        self.prune_step = max(1, round(self.prune_by * session.num_steps))
        device = next(iter(weights_b(lora_layers(self.model)).values())).device
        for tensor in (*self.learned, self.costs):
            tensor.data = tensor.data.to(device)
        self._optimizer = self.gate_optimizer()
        for tensor, moments in zip(self.learned, self._moments, strict=False):
            # Adam counts its steps on the CPU.
            self._optimizer.state[tensor] = {
                key: value if key == "step" else value.to(device) for key, value in moments.items()
            }

    def step(self, number: int) -> None:
        """See `Method.step`."""
        if not self.is_gated:
            return
        self.update_gates()
        self._optimizer.zero_grad()
        self.num_steps_done = number
        if number >= self.prune_step or self.is_due(number):
            self._prune(number)

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return self.prune_step if self.budget_step is None else self.budget_step

    def finish(self) -> None:
        """See `Method.finish`."""
        if self.budget_step is None:
            raise RuntimeError(
                f"{self.about.name} reaches its budget at step {self.prune_step} at the latest, "
                "and the run ended before, with more ranks than that; train until then, or lower "
                "`prune_by`."
            )

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`: with the gates in B, so that what is opened computes the same."""
        if not self.is_gated:
            super().save(folder, **options)
            return
        weights = self.model.state_dict()
        for name, gate in self._by_module(self.final_gates()).items():
            key = f"base_model.model.{name}.lora_B.default.weight"
            weights[key] = weights[key] * gate.to(weights[key])
        self.model.save_pretrained(folder, **{**options, "state_dict": weights})

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        self._remove_gates()
        super().load(folder)

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        state = {"budget_step": self.budget_step, "found": self.found}
        if not self.is_gated:
            return state
        return {
            **state,
            "num_steps_done": self.num_steps_done,
            "weights_b": {
                name: b.detach() for name, b in weights_b(lora_layers(self.model)).items()
            },
            "learned": [tensor.detach() for tensor in self.learned],
            "moments": [dict(self._optimizer.state[tensor]) for tensor in self.learned],
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        self.budget_step, self.found = state["budget_step"], dict(state["found"])
        if "learned" not in state:
            return
        self.num_steps_done, self._moments = state["num_steps_done"], state["moments"]
        for name, b in weights_b(lora_layers(self.model)).items():
            b.data.copy_(state["weights_b"][name])
        for tensor, saved in zip(self.learned, state["learned"], strict=True):
            tensor.data.copy_(saved)
        self._put_gates()

    def _put_gates(self) -> None:
        self._remove_gates()
        self._handles = gate_ranks(self.model, lambda name: self.gate(self.where[name]))

    def _remove_gates(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _by_module(self, gates: Tensor) -> dict[str, Tensor]:
        return {name: gates[where] for name, where in self.where.items()}

    def _prune(self, number: int) -> None:
        """Drop ranks down to the budget, and be plain LoRA."""
        gates = self.final_gates()
        kept = keep_highest(self.importance(), self.costs, self.budget)
        sparsity = float(self.costs[gates == 0].sum() / self.costs.sum())
        self.found = {"sparsity": sparsity, **self.told_by_gates(kept)}
        self.session.log({f"{self.about.name}_{name}": n for name, n in self.found.items()})
        by_module = self._by_module(gates)
        self._remove_gates()
        fold_gates(self.model, by_module, optimizer=self.session.optimizer)
        indices = {name: kept[where].nonzero().flatten() for name, where in self.where.items()}
        plan = Plan(
            kept={name: tuple(found.tolist()) for name, found in indices.items()},
            added=dict.fromkeys(indices, 0),
            pruned={},
        )
        resize(self.model, plan, optimizer=self.session.optimizer)
        self.budget_step = number


def keep_highest(importance: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Which ranks stay when the lowest are dropped one by one until the others fit the budget.

    Of equal ones the earlier is dropped first.

    Args:
        importance: Shape (num_ranks,).
        costs: Parameters of each.
        budget: Parameters that the kept ranks may have together.

    Returns:
        True where a rank stays.
    """
    order = torch.argsort(importance, stable=True)
    dropped = torch.cat([costs.new_zeros(1), costs[order].cumsum(0)])  # after none, one, two, ...
    num_dropped = int((costs.sum() - dropped > budget).sum())
    kept = torch.ones_like(costs, dtype=torch.bool)
    kept[order[:num_dropped]] = False
    return kept
