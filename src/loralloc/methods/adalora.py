"""AdaLoRA (Zhang et al. 2023), by PEFT: triplets as of an SVD, of which a schedule prunes half.

PEFT leaves it to its user to give the run's length, to allocate after every step and to let the
model compute the loss; forgotten, the ranks stay as they were and nothing says so. The run does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, PeftConfig, TaskType
from peft.tuners.adalora import AdaLoraLayer
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from loralloc.allocation.files import read_tensors
from loralloc.methods.in_place import WEIGHTS_NAME
from loralloc.methods.method import About
from loralloc.methods.orthogonal import off_orthonormal
from loralloc.methods.peft_method import LoraShaped, PeftMethod
from loralloc.methods.session import Session

START = 2
"""Ranks at the start over ranks at the end, on average (the paper's comparison)."""

ADAPTER = "default"


@dataclass(kw_only=True)
class AdaLora(LoraShaped):
    """y = W x + s P (E * (Q x)), P and Q normal with standard deviation 0.02, E zero at the start.

    After each optimiser step PEFT smooths the sensitivity |w dL/dw| of every element and its
    uncertainty, and of all triplets (E_i, P_i, Q_i) of the model it leaves E_i of the most
    important b(t) as it is and sets the others to zero. With r ranks on average at the end, M
    modules, T steps, b_0 = 2 r M and b_T = r M,

        b(t) = b_0                                                              t <= t_init
        b(t) = b_T + (b_0 - b_T) (1 - (t - t_init) / (T - t_final - t_init))^3   until T - t_final

    from when on the triplets that are zero stay so. The loss gains 0.1 times the mean over all P
    and Q of ||P^T P - I||_F. PEFT multiplies by alpha / r at the start, so alpha is s times that.
    """

    scale: float = 8.0
    """What the update is multiplied by: alpha / r at the start. The authors' script for SST-2 has
    16 / 2, those for QNLI 32 / 2 and for summaries 32 / 12. At LoRA's 2 vectors as short as its own
    learn too slowly."""

    orthogonality: float = 0.1
    """Weight of the regulariser."""

    warmup_share: float = 0.1
    """t_init / T."""

    final_share: float = 0.45
    """t_final / T."""

    fits_parameters: bool = True
    """Whether the last allocation leaves as many triplets as come nearest to the parameters of the
    budget, more or fewer than r M. As published there are r M, whatever these have."""

    about: ClassVar[About] = About(
        name="adalora",
        title="AdaLoRA",
        paper="Zhang et al. 2023",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=8e-4,
        rate_from="the authors' script for SST-2 (DeBERTaV3-base)",
        differs="The scale is 8, as in its authors' script for SST-2 (alpha 16, 2 ranks at the "
        "start), not LoRA's. The last allocation leaves as many triplets as fit the budget in "
        "parameters; with `fits_parameters` false the budget is in triplets, as published, and "
        "LoRA's in parameters only where modules are of one size.",
        merges=True,
    )
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

    def __post_init__(self) -> None:
        """Check the shares.

        Raises:
            ValueError: One is not between 0 and 1.
        """
        for name in ("warmup_share", "final_share"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(
                    f"`{name}` is {share}; it is a share of the run, from 0 to less than 1."
                )

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        assert self.rank is not None, "fit() chooses it"
        plain = self.lora_config(model, START * self.rank, task_type=task_type, heads=heads)
        return AdaLoraConfig(
            init_r=plain.r,
            target_r=self.rank,
            lora_alpha=plain.lora_alpha,
            lora_dropout=plain.lora_dropout,
            target_modules=plain.target_modules,
            modules_to_save=plain.modules_to_save,
            fan_in_fan_out=plain.fan_in_fan_out,
            task_type=task_type,
            orth_reg_weight=0.0,  # PEFT's own term depends on who computes the loss: `extra_loss`
            total_step=1,  # PEFT wants one now; `begin` knows the run's
        )

    @property
    def _config(self) -> AdaLoraConfig:
        config: AdaLoraConfig = self.model.peft_config[ADAPTER]
        return config

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: The run is too short for the schedule.
        """
        config, num_steps = self._config, session.num_steps
        # E is zero before the first step, and so is every sensitivity in it.
        tinit = max(2, round(self.warmup_share * num_steps))
        tfinal = int(self.final_share * num_steps)
        if tinit >= num_steps - tfinal:
            raise ValueError(
                f"Of the run's {num_steps} steps adalora keeps its ranks for the first {tinit} and "
                f"the last {tfinal}, so none is left to allocate in; train for longer, or lower "
                "`warmup_share` or `final_share`."
            )
        config.tinit, config.tfinal, config.total_step = tinit, tfinal, num_steps
        config.deltaT = max(1, num_steps // 300)

    def extra_loss(self) -> Tensor:
        """See `Method.extra_loss`."""
        distances = []
        for layer in self._layers():
            distances.append(off_orthonormal(layer.lora_A[ADAPTER]))
            distances.append(off_orthonormal(layer.lora_B[ADAPTER].T))
        return self.orthogonality * torch.stack(distances).mean()

    def step(self, number: int) -> None:
        """See `Method.step`."""
        if number == self.first_eligible_step() and self.fits_parameters and self.sized_for:
            allocator = self.model.base_model.rankallocator
            allocator.target_bgt = min(self._num_that_fit(self.sized_for), allocator.init_bgt - 1)
        self.model.base_model.update_and_allocate(number)
        if number < self.first_eligible_step():
            # PEFT saves what the pattern names, but until then any triplet may come back.
            self._config.rank_pattern = None

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return int(self._config.total_step - self._config.tfinal)

    def finish(self) -> None:
        """See `Method.finish`."""
        if self._config.rank_pattern is None:
            raise RuntimeError(
                f"adalora allocates its ranks until step {self.first_eligible_step()}, and the run "
                "ended before, with twice the ranks of its budget; train until then."
            )
        if not any(layer.lora_E[ADAPTER].any() for layer in self._layers()):
            raise RuntimeError(
                "adalora found every triplet of importance zero and pruned all of them, so nothing "
                "was trained; raise the learning rate or train for longer."
            )

    def num_stored(self) -> int:
        """See `Method.num_stored`: of a triplet in + out + 1, once it is known which stay."""
        if self._config.rank_pattern is None:
            return self.num_trained()
        return sum(
            int(layer.lora_E[ADAPTER].count_nonzero())
            * (layer.in_features + layer.out_features + 1)
            for layer in self._layers()
        )

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`."""
        with warnings.catch_warnings():
            # PEFT takes a module that has lost every triplet for one whose shards are missing.
            warnings.filterwarnings("ignore", "Adapter .* have invalid shape", PeftWarning)
            super().save(folder, **options)

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`."""
        saved, now = PeftConfig.from_pretrained(str(folder)), self._config
        for option in ("peft_type", "init_r", "target_r", "lora_alpha"):
            before, after = getattr(saved, option, None), getattr(now, option)
            if before != after:
                raise ValueError(
                    f"The run in {folder} began with `{option}` of {before}, and now it is "
                    f"{after}; resume with the value it began with."
                )

    def load(self, folder: Path) -> None:
        """See `Method.load`."""
        saved = read_tensors(folder / WEIGHTS_NAME)
        self._set({key: tensor for key, tensor in saved.items() if ".lora_" in key})
        self._config.rank_pattern = None  # or PEFT would cut once more
        PeftMethod.load(self, folder)
        self._config.rank_pattern = PeftConfig.from_pretrained(str(folder)).rank_pattern

    def state(self) -> dict[str, Any]:
        """See `Method.state`: what `save` leaves out, and what the next steps go by."""
        allocator, is_final = self.model.base_model.rankallocator, self._config.rank_pattern
        return {
            "weights": self._weights() if is_final else {},
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        self._set(state["weights"])
        parameters = dict(self.model.base_model.model.named_parameters())
        allocator = self.model.base_model.rankallocator
        allocator.exp_avg_ipt, allocator.exp_avg_unc = (
            {name: value.to(parameters[name]) for name, value in state[key].items()}
            for key in ("sensitivity", "uncertainty")
        )
        allocator.ipt = dict(allocator.exp_avg_ipt)  # only its names are read

    def _num_that_fit(self, budget: int) -> int:
        """How many triplets, from the most important on, come nearest to so many parameters."""
        allocator = self.model.base_model.rankallocator
        scores, costs = [], []
        for name, layer in self.model.base_model.model.named_modules():
            if not isinstance(layer, AdaLoraLayer):
                continue
            e, q, p = (allocator._element_score(f"{name}.lora_{part}.{ADAPTER}") for part in "EAB")
            scores.append(e.flatten() + q.mean(dim=1) + p.mean(dim=0))
            costs.append(torch.full_like(scores[-1], layer.in_features + layer.out_features + 1))
        order = torch.cat(scores).argsort(descending=True)
        spent = torch.cat(costs)[order].double().cumsum(dim=0)
        return int((spent - budget).abs().argmin()) + 1

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, AdaLoraLayer)]

    def _weights(self) -> dict[str, Tensor]:
        """Every Q, E and P in full, as PEFT names them in a saved adapter."""
        suffix = f".{ADAPTER}"
        return {
            name.removesuffix(suffix): parameter.detach()
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        }

    def _set(self, weights: Mapping[str, Tensor]) -> None:
        """Give Q, E and P these values and shapes."""
        for name, tensor in weights.items():
            store = self.model.get_submodule(name)
            old = store[ADAPTER]
            store[ADAPTER] = nn.Parameter(tensor.to(old), requires_grad=old.requires_grad)
