"""A learning rate for every module: lr_m = lr (r0 / r_m)^p, by what an optimiser's step changed.

With the scaling s frozen, a module that has grown from r0 to r_m ranks takes larger steps in
function space: each of its ranks moves as far as ever. The steps of the known optimisers are linear
in the learning rate, w <- w - lr u, weight decay included, and what they keep does not depend on
it. So

    w <- w_old + (r0 / r_m)^p (w_new - w_old)

after a step is the step at the module's own rate, and no group of the optimiser is added or
changed, by which schedulers go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from loralloc.allocation.layers import lora_layers, ranks, weights_ab
from loralloc.allocation.optimizer_state import bare_optimizer


class ModuleRates:
    """Scales the steps of modules whose rank is not what it was, while an optimiser is followed.

    It holds a copy of these modules' weights during a step, and nothing between two.

    Args:
        model: A PEFT model with a plain LoRA adapter.
        initial_ranks: The rank of every module before the first round (r0).
        power: p, from 0 (one rate for all).
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(
        self, model: nn.Module, initial_ranks: Mapping[str, int], power: float, adapter_name: str
    ) -> None:
        self._model, self._adapter_name = model, adapter_name
        self._initial_ranks, self._power = initial_ranks, power
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []

    def follow(self, optimizer: Any) -> None:
        """Scale the steps of this optimiser from now on, and of no other.

        Args:
            optimizer: What trains the adapter, under wrappers or not.
        """
        bare = bare_optimizer(optimizer)
        if bare is self._optimizer:
            return
        self.release()
        if bare is not None and self._power:
            self._optimizer = bare
            self._handles = [
                bare.register_step_pre_hook(self._remember),
                bare.register_step_post_hook(self._scale),
            ]

    def release(self) -> None:
        """Leave the optimiser alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._optimizer = [], [], None

    def check_followed(self, optimizer: Any) -> None:
        """Refuse a round of an optimiser whose steps are not scaled.

        Raises:
            RuntimeError: `follow` was not called with it.
        """
        if self._power and bare_optimizer(optimizer) is not self._optimizer:
            raise RuntimeError(
                "`rank_lr_power` scales the steps of an optimiser that it follows, and this one is "
                "not followed; call `begin(optimizer)` before the first step."
            )

    def factor(self, name: str, rank: int) -> float:
        """(r0 / r_m)^p, by which the steps of a module are scaled now.

        Args:
            name: The module.
            rank: Its rank now.
        """
        return float((self._initial_ranks[name] / rank) ** self._power)

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        layers = lora_layers(self._model, self._adapter_name)
        self._before = []
        now = ranks(layers, self._adapter_name)
        for name, pair in weights_ab(layers, self._adapter_name).items():
            factor = self.factor(name, now[name])
            if factor != 1:
                self._before += [(weight, weight.clone(), factor) for weight in pair]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        for weight, before, factor in self._before:
            weight.copy_(before + factor * (weight - before))
        self._before = []
