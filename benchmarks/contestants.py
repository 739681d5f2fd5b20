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
    weights = [p for p in model.parameters() if p.requires_grad]

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for weight in weights:
            weight.grad = None

    def floor() -> None:
        with model.disable_adapter():
            inputs = {k: v for k, v in batch.items() if k != "input_ids"}
            embedded = inner.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            logits, targets = supervised_logits(model, {**inputs, "inputs_embeds": embedded})
            functional.cross_entropy(logits.float(), targets).backward()

    def supervised() -> None:
        with stock(inner):
            logits, targets = supervised_logits(model, batch)
            backward(functional.cross_entropy(logits.float(), targets))

    def hf() -> None:
        with stock(inner):
            backward(model(**batch, use_cache=False).loss)

    return {
        "floor": floor,
        "hf": hf,
        "peft": supervised,
        "ours": lambda: backward(loss_at_head(batch).mean),
    }


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
