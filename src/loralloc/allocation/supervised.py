"""The loss of a causal language model with its head at supervised positions only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loralloc.allocation.layers import base_model
from loralloc.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100
"""Label of a position that no loss is taken on, everywhere in Transformers."""


class Supervised(NamedTuple):
    """The loss at the supervised positions of a batch."""

    losses: Tensor
    """Cross-entropy at each of them, row after row: float32 of shape (tokens,) with its graph."""

    correct: Tensor
    """How many of their targets have the highest logit."""

    @property
    def total(self) -> Tensor:
        """Cross-entropy summed over them, a float32 scalar with its graph."""
        return self.losses.sum()

    @property
    def num_targets(self) -> int:
        """How many they are."""
        return len(self.losses)


class SupervisedLoss:
    """Cross-entropy of a causal language model at supervised positions.

    The logits of a small model with a large vocabulary cost as much as its blocks, and most of
    them are of prompts, which no loss is taken on. A head that is frozen and linear, and whose
    logits the model passes on as they are, is computed together with the loss, a few positions
    at a time; any other runs once for all supervised positions.

    Args:
        model: The model, adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._passes_on: bool | None = None  # not known before the first batch

    def is_bounded(self, inputs: Mapping[str, Any]) -> bool:
        """Whether memory for logits is bounded, whatever the batch.

        Args:
            inputs: A batch; until one has been seen, its first example is run to tell.
        """
        base: Any = base_model(self._model)
        if not _is_frozen_linear(base.get_output_embeddings()):
            return False
        if self._passes_on is None:
            first = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            with torch.no_grad():
                self(first)
        return bool(self._passes_on)

    def __call__(
        self, inputs: Mapping[str, Any], *, through: nn.Module | None = None
    ) -> Supervised:
        """Run the model.

        Args:
            inputs: Arguments of its forward on the model's device; `labels` as Transformers has
                them, one for each input position and not yet shifted.
            through: A wrapper of the model whose forward is to be called, for several processes.
        """
        run = functools.partial(_run, self._model, inputs, through=through)
        base: Any = base_model(self._model)
        head = base.get_output_embeddings()
        if self._passes_on is False or not _is_frozen_linear(head):
            _, logits, targets = run()
            return _from_logits(logits, targets)
        # Known numbers that the head puts out, once, show whether the model scales or caps them.
        known = torch.linspace(-100, 100, len(head.weight)).to(head.weight)
        hidden, logits, targets = run(instead_of_logits=known)
        if self._passes_on is None:
            self._passes_on = torch.equal(logits, known[None])
            if not self._passes_on:
                return self(inputs, through=through)
        return Supervised(*linear_cross_entropy(hidden, head.weight, targets, head.bias))


def supervised_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model with its head at supervised positions only.

    Args:
        model: The model, adapted or not.
        inputs: As `SupervisedLoss` takes them.

    Returns:
        Logits of shape (tokens, vocabulary) and targets of shape (tokens,).
    """
    _, logits, targets = _run(model, inputs)
    return logits, targets


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    through: nn.Module | None = None,
    instead_of_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, logits and targets at supervised positions.

    A hook on the head's input selects the positions, so nothing need be known about the model.
    Where something is given instead, the head computes nothing and the model goes on with that.
    """
    arguments = {**inputs, "use_cache": False}
    targets = arguments.pop("labels")[:, 1:]
    supervised = targets != IGNORED
    kept: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0][:, :-1][supervised])  # (batch, length, hidden) -> (tokens, hidden)
        read = kept[0] if instead_of_logits is None else kept[0][:0]
        return (read.unsqueeze(0), *args[1:])

    def replace(*_: Any) -> Tensor | None:
        return None if instead_of_logits is None else instead_of_logits[None, None]

    base: Any = base_model(model)
    head = base.get_output_embeddings()
    handles = [head.register_forward_pre_hook(select), head.register_forward_hook(replace)]
    try:
        logits = (through or model)(**arguments).logits
    finally:
        for handle in handles:
            handle.remove()
    return kept[0], logits[0], targets[supervised]


def _from_logits(logits: Tensor, targets: Tensor) -> Supervised:
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return Supervised(losses, (logits.detach().argmax(dim=-1) == targets).sum())


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is W h + b with a frozen W, and nothing acts on it from outside."""
    is_hooked = bool(head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    trains = any(parameter.requires_grad for parameter in head.parameters())
    return type(head) is nn.Linear and not is_hooked and not trains
