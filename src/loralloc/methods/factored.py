"""LoRA with a factor on every rank, W + s B diag(e) A, whose ranks move while it trains.

The factors are vectors outside the model, so that what is saved is stock PEFT LoRA at any time; at
the end they go into B.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import TaskType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from loralloc.allocation.gates import fold_gates, gate_ranks
from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab, weights_b
from loralloc.allocation.optimizer_state import check_optimizer, swap
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize
from loralloc.methods.orthogonal import off_orthonormal
from loralloc.methods.peft_method import LoraShaped
from loralloc.methods.session import Session

STD = 0.02
"""Standard deviation of A and B at the start, as in AdaLoRA."""


@dataclass(kw_only=True)
class FactoredLora(LoraShaped):
    """y = W x + s B (e * (A x)). The factors e have an AdamW of their own, without decay."""

    factor_at_start: ClassVar[float] = 0.0
    """What every factor begins with."""

    def draw(self, layer: LoraLayer) -> None:
        """Draw A and B of a layer anew; left as LoRA has them where a method does nothing."""

    def factor_lr(self) -> float:
        """Learning rate of the factors in this step: the run's."""
        return float(self.session.optimizer.param_groups[0]["lr"])

    def final_factor(self, name: str) -> Tensor:
        """What multiplies the ranks of a module, and goes into B in the end."""
        return self.factors[name]

    def factor(self, name: str) -> Tensor:
        """What multiplies them in a forward pass."""
        return self.final_factor(name)

    @abstractmethod
    def observe(self, number: int) -> None:
        """See the gradients of the step of this number, which the weights have taken."""

    def before_factors(self) -> None:
        """Act on the factors' gradients before they move."""

    @abstractmethod
    def allocate(self, number: int) -> None:
        """Act after the optimiser's step of this number: the place where ranks move."""

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        super().prepare(model, task_type=task_type, heads=heads)
        self.factors: dict[str, nn.Parameter] = {}
        for name, layer in lora_layers(self.model).items():
            self.draw(layer)
            start = torch.full((int(layer.r["default"]),), self.factor_at_start, device="cpu")
            self.factors[name] = nn.Parameter(start)
        self._handles: list[RemovableHandle] = []
        self._moments: dict[str, dict[str, Any]] = {}
        self._put()
        return self.model

    @property
    def is_factored(self) -> bool:
        """Whether the factors are still beside the model."""
        return bool(self._handles)

    def costs(self) -> dict[str, int]:
        """Parameters of one rank of every module."""
        return {name: rank_cost(layer) for name, layer in lora_layers(self.model).items()}

    def beside(self) -> dict[str, Tensor]:
        """See `Method.beside`."""
        if not self.is_factored:
            return {}
        return {f"the factors of {name}": factor for name, factor in self.factors.items()}

    def check_optimizer(self, optimizer: Optimizer | None) -> None:
        """See `Method.check_optimizer`."""
        check_optimizer(optimizer, weights_ab(lora_layers(self.model)))

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            TypeError: Ranks cannot be moved under the optimiser.
        """
        self.check_optimizer(session.optimizer)
        self.session = session
        if not self.is_factored:
            return
        for name, (a, _) in weights_ab(lora_layers(self.model)).items():
            self.factors[name].data = self.factors[name].data.to(a.device)
        self.factor_optimizer: Optimizer = AdamW(self.factors.values(), weight_decay=0.0)
        for name, moments in self._moments.items():
            factor = self.factors[name]
            # Adam counts its steps on the CPU.
            self.factor_optimizer.state[factor] = {
                key: value if key == "step" else value.to(factor.device)
                for key, value in moments.items()
            }

    def step(self, number: int) -> None:
        """See `Method.step`."""
        if not self.is_factored:
            return
        for group in self.factor_optimizer.param_groups:
            group["lr"] = self.factor_lr()
        self.before_factors()
        self.factor_optimizer.step()
        self.observe(number)
        self.factor_optimizer.zero_grad()

    def after_step(self, number: int, epoch: float) -> bool:
        """See `Method.after_step`: ranks move, where they are due."""
        if not self.is_factored:
            return False
        before = {name: len(factor) for name, factor in self.factors.items()}
        self.allocate(number)
        return before != {name: len(factor) for name, factor in self.factors.items()}

    @torch.no_grad()
    def move(self, plan: Plan, *, new: float) -> None:
        """Carry out a plan, with the factors and their optimiser.

        Args:
            plan: What stays and how many come.
            new: The factors that new ranks begin with.
        """
        resize(self.model, plan, optimizer=self.session.optimizer)
        for name, kept in plan.kept.items():
            old, added = self.factors[name], plan.added[name]
            values = torch.cat([old.detach()[list(kept)], old.new_full((added,), new)])
            self.factors[name] = nn.Parameter(values)
            swap(self.factor_optimizer, old, self.factors[name], kept, added, dim=0)
            if not len(values):
                del self.factors[name]

    def fold(self) -> None:
        """Put the factors into B for good: then it is plain LoRA."""
        values = {name: self.final_factor(name).detach() for name in self.factors}
        fold_gates(self.model, values, optimizer=self.session.optimizer)
        self._remove()

    def finish(self) -> None:
        """See `Method.finish`."""
        if self.is_factored:
            self.fold()

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`: with the factors in B, so that what is opened computes the same."""
        if not self.is_factored:
            super().save(folder, **options)
            return
        weights = self.model.state_dict()
        for name in self.factors:
            key = f"base_model.model.{name}.lora_B.default.weight"
            weights[key] = weights[key] * self.final_factor(name).detach().to(weights[key])
        self.model.save_pretrained(folder, **{**options, "state_dict": weights})

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        self._remove()
        super().load(folder)

    def state(self) -> dict[str, Any]:
        """See `Method.state`: what `save` has put together, apart."""
        if not self.is_factored:
            return {}
        b = weights_b(lora_layers(self.model))
        return {
            "weights_b": {name: weight.detach() for name, weight in b.items()},
            "factors": {name: factor.detach() for name, factor in self.factors.items()},
            "moments": {
                name: dict(self.factor_optimizer.state[factor])
                for name, factor in self.factors.items()
            },
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if "factors" not in state:
            return
        for name, b in weights_b(lora_layers(self.model)).items():
            b.data.copy_(state["weights_b"][name])
        device = next(self.model.parameters()).device
        self.factors = {
            name: nn.Parameter(value.to(device)) for name, value in state["factors"].items()
        }
        self._moments = state["moments"]
        self._put()

    def _put(self) -> None:
        self._remove()
        self._handles = gate_ranks(self.model, self.factor)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass(kw_only=True)
class TripletLora(FactoredLora):
    """Factors as singular values: A and B normal and held near orthogonal, as in AdaLoRA."""

    orthogonality: float = 0.1
    """Weight of the mean over all A and B of ||A A^T - I||_F in the loss."""

    def draw(self, layer: LoraLayer) -> None:
        """See `FactoredLora.draw`."""
        for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            nn.init.normal_(weight, std=STD)

    def extra_loss(self) -> Tensor | None:
        """See `Method.extra_loss`."""
        if not self.is_factored or not self.orthogonality:
            return None
        distances = [
            distance
            for a, b in weights_ab(lora_layers(self.model)).values()
            for distance in (off_orthonormal(a), off_orthonormal(b.T))
        ]
        return self.orthogonality * torch.stack(distances).mean()
