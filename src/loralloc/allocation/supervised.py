"""The loss of a causal language model with its head at supervised positions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from loralloc.allocation.layers import base_model
from loralloc.kernels.cross_entropy import linear_cross_entropy
from loralloc.kernels.products import autocast_dtype

IGNORED = -100
"""Label of a position that no loss is taken on, everywhere in Transformers."""


class Supervised(NamedTuple):
    """The loss at the supervised positions of a batch."""

    losses: Tensor
    """Cross-entropy at each of them, row after row: float32 of shape (tokens,) with its graph."""

    correct: Tensor
    """How many of their targets argmax would have chosen."""

    router: Tensor | None
    """What a mixture of experts adds to its mean loss so that its experts share the work, weighted:
    a scalar with its graph. None where the model returns nothing of the kind."""

    @property
    def total(self) -> Tensor:
        """Cross-entropy summed over them, a float32 scalar with its graph."""
        return self.losses.sum()

    @property
    def num_targets(self) -> int:
        """How many they are."""
        return len(self.losses)

    @property
    def mean(self) -> Tensor:
        """The loss that the model itself returns, a float32 scalar with its graph."""
        mean = self.total / max(1, self.num_targets)
        return mean if self.router is None else mean + self.router


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
            examples = len(inputs["labels"])
            first = {
                name: value[:1] if _is_of_examples(value, examples) else value
                for name, value in inputs.items()
            }
            device: torch.device = inputs["labels"].device
            devices = [device] if device.type == "cuda" else []
            # A run that is resumed asks again, and draws what the one that went on has drawn.
            with torch.no_grad(), torch.random.fork_rng(devices):
                self(first)
        return bool(self._passes_on)

    def __call__(
        self,
        inputs: Mapping[str, Any],
        *,
        positions: Tensor | None = None,
        through: nn.Module | None = None,
    ) -> Supervised:
        """Run the model.

        Args:
            inputs: Arguments of its forward on the model's device; `labels` as Transformers has
                them, one for each input position and not yet shifted.
            positions: The `supervised_positions` of the labels, where they are known already.
            through: A wrapper of the model whose forward is to be called, for several processes.
        """
        if positions is None:
            positions = supervised_positions(inputs["labels"])
        targets = inputs["labels"].flatten()[positions + 1]
        base: Any = base_model(self._model)
        head = base.get_output_embeddings()
        if self._passes_on is False or not _is_frozen_linear(head) or _is_sharded(base):
            outputs = _run(self._model, inputs, positions, through=through)
            losses, correct = _from_logits(outputs.logits[0], targets)
        else:
            draw_again = _from_here(positions.device) if self._passes_on is None else None
            hidden, outputs = self._run_without_head(head, inputs, positions, through)
            if draw_again and not self._passes_on:
                draw_again()
                return self(inputs, positions=positions, through=through)
            losses, correct = linear_cross_entropy(hidden, head.weight, targets, head.bias)
        return Supervised(losses, correct, _router_loss(base, outputs))

    def _run_without_head(
        self,
        head: nn.Linear,
        inputs: Mapping[str, Any],
        positions: Tensor,
        through: nn.Module | None,
    ) -> tuple[Tensor, Any]:
        """Hidden states at supervised positions, in the dtype of the head's arithmetic."""
        kept: list[Tensor] = []
        size, known = len(head.weight), None
        if self._passes_on is None:
            # Known numbers that the head puts out show whether the model scales or caps them.
            known = torch.linspace(-100, 100, size, device=head.weight.device)
            known = known.to(head.weight.dtype)[None, None]

        def stand_in(hidden: Tensor) -> Tensor:
            hidden = _at(positions, hidden, inputs)
            kept.append(hidden.to(autocast_dtype(hidden) or hidden.dtype))
            # Logits of no position, or the known ones; with a graph, which a wrapper may follow.
            none = hidden[None, :0, :1].expand(-1, -1, size)
            return none if known is None else known + none.sum()

        vars(head)["forward"] = stand_in
        try:
            outputs = _call(self._model if through is None else through, inputs)
        finally:
            del vars(head)["forward"]
        if known is not None:
            self._passes_on = torch.equal(outputs.logits.to(known.dtype), known)
        return kept[0], outputs


def _is_of_examples(value: Any, examples: int) -> bool:
    """Whether an argument has a row for each example."""
    return isinstance(value, Tensor) and value.shape[:1] == (examples,)


def _from_here(device: torch.device) -> Callable[[], None]:
    """What lets the random numbers that will be drawn be drawn once more."""
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def draw_again() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return draw_again


def supervised_positions(labels: Tensor) -> Tensor:
    """The positions whose next token a loss is taken on, counted through all examples.

    How many there are is not known before they are found: a GPU is waited for here, and nowhere
    else in a step.

    Args:
        labels: Shape (batch, length), not yet shifted.

    Returns:
        Ascending numbers below batch * length, shape (tokens,).
    """
    is_supervised = labels.roll(-1, dims=1) != IGNORED
    is_supervised[:, -1] = False
    return is_supervised.flatten().nonzero()[:, 0]


def supervised_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model with its head at supervised positions only.

    Args:
        model: The model, adapted or not.
        inputs: As `SupervisedLoss` takes them.

    Returns:
        Logits of shape (tokens, vocabulary) and targets of shape (tokens,).
    """
    positions = supervised_positions(inputs["labels"])
    outputs = _run(model, inputs, positions)
    return outputs.logits[0], inputs["labels"].flatten()[positions + 1]


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    *,
    through: nn.Module | None = None,
) -> Any:
    """The model's outputs with its head run at some positions, as if they were one example.

    A hook on the head's input selects them, so nothing need be known about the model.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at(positions, args[0], inputs).unsqueeze(0), *args[1:])

    base: Any = base_model(model)
    handle = base.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return _call(model if through is None else through, inputs)
    finally:
        handle.remove()


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model's forward without the labels, of which it would make a loss of its own."""
    arguments = {**inputs, "use_cache": False}
    del arguments["labels"]
    return model(**arguments)


def _at(positions: Tensor, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """What the head reads at some positions: (batch, length, hidden) to (tokens, hidden)."""
    read, labelled = hidden.shape[:2], inputs["labels"].shape
    if read != labelled:
        raise ValueError(
            f"The head of the model reads {tuple(read)} examples and positions, and `labels` has "
            f"the shape {tuple(labelled)}; give one label for each input position."
        )
    return hidden.flatten(0, 1).index_select(0, positions)


def _from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses, (logits.detach().argmax(dim=-1) == targets).sum()


def _router_loss(base: Any, outputs: Any) -> Tensor | None:
    """The loss of a mixture's router as the model weighs it, where the outputs have one."""
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    for owner in (base, base.config, base.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (weight := getattr(owner, name, None)) is not None:
                return float(weight) * loss
    raise ValueError(
        f"The outputs of {type(base).__name__} have an `aux_loss`, and its configuration has no "
        "`router_aux_loss_coef` to weigh it with; set one, or `output_router_logits` to False."
    )


def _is_sharded(base: nn.Module) -> bool:
    """Whether the head's weight is whole in the model's own forward pass only."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and any(isinstance(module, FSDPModule) for module in base.modules())
    )


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is W h + b with a frozen W, and nothing acts on it from outside."""
    is_hooked = bool(head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    trains = any(parameter.requires_grad for parameter in head.parameters())
    return type(head) is nn.Linear and not is_hooked and not trains
