"""SSP (S3Delta, Hu et al. 2022): a search for which small modules to train, and where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.hooks import RemovableHandle

from loralloc.allocation import replicas
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import About
from loralloc.methods.optimizer import train_what_is_left
from loralloc.methods.peft_method import rank_parameters, resolve_targets
from loralloc.methods.session import Session
from loralloc.methods.ssp.gates import probabilities, relaxed_gates, within_budget
from loralloc.methods.ssp.units import Candidate, Unit, search_space

CLIP = 2.0
"""Norm that the gradient of the architecture weights is clipped to."""


@dataclass(kw_only=True)
class Ssp(InPlaceMethod):
    """Units of LoRA, BitFit, LNFit and adapters, of which a search keeps half.

    While it searches, the output of unit i is multiplied by a gate z_i, drawn once a step from
    a probability p_i such that the expected size is the budget. After each step on the weights,
    the architecture weights alpha take one on training examples that the weights never see
    (first-order DARTS). Then units are kept by falling p while they fit the budget; they are drawn
    anew and trained for as long as other methods. Adapters are among them, so it does not merge.
    """

    rank: int | None = None
    """Ranks of a LoRA unit; None for those at which LoRA alone has the budget's parameters."""

    max_parameters: int | None = None
    """What is kept at most; None for the budget, or for LoRA's where a rank is given. The search
    space is about twice that, by the width of its adapters."""

    scale: float = 2.0
    """What a LoRA unit's update is multiplied by: alpha / r of LoRA."""

    targets: Sequence[str] | str | None = None
    """Linear layers to adapt, as PEFT's `target_modules`; None for every one of every block."""

    search_share: float = 0.25
    """Steps that search, on top of the run's, as a share of these; above 0 and at most 1, which is
    what the authors take."""

    beta: float = 1.0
    """Temperature of the probabilities."""

    alpha_lr: float = 0.1
    """Learning rate of the architecture weights at the start; it falls to 0 as they are done."""

    about: ClassVar[About] = About(
        name="ssp",
        title="SSP",
        paper="Hu et al. 2022",
        status="port",
        initialisation="ours",
        settings="ours",
        learning_rate=3e-4,
        rate_from="the authors' code",
        differs="Searched to first order; LoRA and adapters are as wide as the budget asks for, "
        "not of rank 1; adapters begin at 0; a task's head goes on from the search as it is.",
    )
    size: ClassVar[str] = "rank"
    paper: ClassVar[Mapping[str, Any]] = {"rank": 8}

    def __post_init__(self) -> None:
        """Refuse options that no search can be made with.

        Raises:
            ValueError: An option is out of its range.
        """
        for name in ("rank", "beta", "alpha_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")
        if not 0 < self.search_share <= 1:
            raise ValueError(
                f"`search_share` is {self.search_share}; it must be above 0 and at most 1, as a "
                "share of the steps that train what was found."
            )

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`: what may be kept, which the end is less than one unit below."""
        if self.max_parameters is not None:
            return self.max_parameters
        return size * rank_parameters(model, resolve_targets(model, self.targets))

    def fit(self, model: nn.Module, budget: int) -> None:
        """See `Method.fit`; unlike a rank, what is kept meets any budget.

        Raises:
            ValueError: The smallest unit is more than the budget.
        """
        one_rank = rank_parameters(model, resolve_targets(model, self.targets))
        if self.max_parameters is None:
            self.max_parameters = budget if self.rank is None else self.rank * one_rank
        if self.rank is None:
            self.rank = max(1, round(self.max_parameters / one_rank))
        smallest = min(candidate.size for candidate in self._search_space(model))
        if smallest > self.max_parameters:
            raise ValueError(
                f"The budget is {self.max_parameters:,} parameters, but the smallest unit that ssp "
                f"can keep has {smallest:,} already; raise `--budget`."
            )

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        self._units: dict[str, Unit] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._candidates = self._search_space(model)
        for candidate in self._candidates:
            owner, _, kind = candidate.name.rpartition(".")
            unit = candidate.build().to(next(candidate.host.parameters()).device)
            model.get_submodule(owner).add_module(kind, unit)
            self._units[candidate.name] = unit
            self._handles[candidate.name] = candidate.act(unit)
        self._sizes = [candidate.size for candidate in self._candidates]
        # On the CPU in any case: not even the paper's 577 numbers are worth a kernel.
        self._alphas = nn.Parameter(torch.zeros(len(self._sizes), dtype=torch.float64))
        self._alpha_optimizer = AdamW([self._alphas], lr=self.alpha_lr, weight_decay=0)
        self._is_found, self._done, self._num_search_steps = False, 0, 0

    def structure(self) -> dict[str, Any]:
        """See `InPlaceMethod.structure`: the names of the units that are kept."""
        return {"units": list(self._units)} if self._is_found else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """See `InPlaceMethod.restructure`."""
        if structure:
            self._keep(structure["units"])

    def search_steps(self, num_steps: int) -> int:
        """See `Method.search_steps`."""
        return max(1, int(self.search_share * num_steps))

    def first_eligible_step(self) -> int:
        """See `Method.first_eligible_step`."""
        return self._num_search_steps

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        self._num_search_steps = session.search_steps
        if not self._is_found:
            self._session = session
            self._set_gates(self._done + 1)

    def step(self, number: int) -> None:
        """See `Method.step`."""
        if self._is_found:
            return
        self._train_alphas(number)
        self._done = number
        if number < self._num_search_steps:
            self._set_gates(number + 1)
        else:
            self._end_search()

    def finish(self) -> None:
        """See `Method.finish`."""
        if not self._is_found:
            raise RuntimeError(
                f"The run ended after {self._done} of the {self._num_search_steps} steps that ssp "
                "searches for, so that nothing was chosen and the budget is not kept; train for "
                "more steps, or lower `search_share`."
            )

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        if self._is_found:
            return {}
        return {
            "done": self._done,
            "alphas": self._alphas.detach().clone(),
            "moments": dict(self._alpha_optimizer.state[self._alphas]),
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        if state:
            self._done = state["done"]
            self._alphas.data.copy_(state["alphas"])
            self._alpha_optimizer.state[self._alphas] = dict(state["moments"])

    def _search_space(self, model: Any) -> list[Candidate]:
        assert self.rank is not None and self.max_parameters is not None, "fit() chooses them"
        return search_space(
            model,
            rank=self.rank,
            max_parameters=self.max_parameters,
            scale=self.scale,
            targets=resolve_targets(model, self.targets),
        )

    def _probabilities(self) -> Tensor:
        assert self.max_parameters is not None, "fit() chooses it"
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        return probabilities(self._alphas, sizes, self.max_parameters, self.beta)

    def _set_gates(self, number: int, *, with_graph: bool = False) -> None:
        """Draw the gates of a step, the same whenever they are asked for."""
        # By the step's number, so that a resumed run goes on with the draws it would have had.
        draws = np.random.default_rng((self._session.seed, number))
        u = torch.from_numpy(draws.random(len(self._sizes)))
        with torch.set_grad_enabled(with_graph):
            p = self._probabilities()
            z = relaxed_gates(p, u)
            device = next(next(iter(self._units.values())).parameters()).device
            both = torch.stack([z, p]).to(device, torch.float32)
        for unit, sampled, expected in zip(
            self._units.values(), both[0].unbind(), both[1].detach().unbind(), strict=True
        ):
            unit.sampled, unit.expected = sampled, expected

    def _train_alphas(self, number: int) -> None:
        """One step on the half of the examples that the weights do not see, with the same u."""
        gradients: list[Tensor] = []
        for batch in self._session.of_second_half():
            self._set_gates(number, with_graph=True)
            gradients += torch.autograd.grad(self._session.loss(batch), [self._alphas])
        self._alphas.grad = torch.stack(gradients).mean(dim=0)
        replicas.average_gradients([self._alphas])
        nn.utils.clip_grad_norm_([self._alphas], CLIP)
        left = 1 - (number - 1) / self._num_search_steps
        self._alpha_optimizer.param_groups[0]["lr"] = self.alpha_lr * max(0.0, left)
        self._alpha_optimizer.step()
        self._alpha_optimizer.zero_grad()

    @torch.no_grad()
    def _end_search(self) -> None:
        """Keep the units that fit, as if they were new."""
        assert self.max_parameters is not None, "fit() chooses it"
        kept = within_budget(self._probabilities(), self._sizes, self.max_parameters)
        chosen = {self._candidates[index].name: self._candidates[index] for index in kept}
        self._keep(chosen)
        for name, unit in self._units.items():
            fresh = chosen[name].build().parameters()
            for parameter, new in zip(unit.parameters(), fresh, strict=True):
                parameter.copy_(new)
            replicas.share(unit.parameters())
        anew = self.model.parameters()  # the head's past was with what is gone, too
        train_what_is_left(self._session.optimizer, self.model, anew=anew)
        del self._session

    def _keep(self, names: Collection[str]) -> None:
        """Take all other units out of the model; those that stay act in full."""
        for name in [name for name in self._units if name not in names]:
            self._handles.pop(name).remove()
            owner, _, kind = name.rpartition(".")
            delattr(self.model.get_submodule(owner), kind)
            del self._units[name]
        for unit in self._units.values():
            unit.sampled = unit.expected = None
        self._is_found = True
