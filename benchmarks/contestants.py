"""The ways to take a step of one model: the frozen model alone, PEFT's two, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from loralloc.allocation.layers import base_model
from loralloc.allocation.supervised import SupervisedLoss, supervised_logits
from loralloc.kernels.lora import is_fused

Step = Callable[[], Any]


def contestants(model: Any, batch: dict[str, Any]) -> dict[str, Step]:
    """The frozen model alone, PEFT with Trainer's loss and with supervised logits, and ours."""
    inner: Any = base_model(model)
    loss_at_head = SupervisedLoss(model)
    backward = backward_of(model)

    def supervised() -> None:
        with stock(inner):
            backward(supervised_loss(model, batch))

    def hf() -> None:
        with stock(inner):
            backward(model(**batch, use_cache=False).loss)

    return {
        "floor": lambda: floor(model, batch),
        "hf": hf,
        "peft": supervised,
        "ours": lambda: backward(loss_at_head(batch).mean),
    }


def floor(model: Any, batch: dict[str, Any]) -> None:
    """Forward of the frozen model alone, and backward to its input."""
    with model.disable_adapter():
        inputs = {k: v for k, v in batch.items() if k != "input_ids"}
        inner: Any = base_model(model)
        inputs["inputs_embeds"] = inner.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        supervised_loss(model, inputs).backward()


def supervised_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The mean loss, with logits at supervised positions only."""
    logits, targets = supervised_logits(model, batch)
    return functional.cross_entropy(logits.float(), targets)


def backward_of(model: Any) -> Callable[[torch.Tensor], None]:
    """Backward from a loss, after which the weights that train have no gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for weight in weights:
            weight.grad = None

    return backward


@contextmanager
def stock(inner: Any) -> Iterator[None]:
    """PEFT's own layers inside; what ours keep from pass to pass stays."""
    fused: list[tuple[Any, Any]] = [(m, type(m)) for m in inner.modules() if is_fused(m)]
    for layer, cls in fused:
        layer.__class__ = cls.__base__
    try:
        yield
    finally:
        for layer, cls in fused:
            layer.__class__ = cls
