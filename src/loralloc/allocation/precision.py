"""Losses of ablations differ in their last digits: computing them in float32, or saying why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FLOAT32_BYTES = 4


@contextmanager
def full_precision(model: nn.Module, *, mixed: torch.dtype | None = None) -> Iterator[None]:
    """Let a model whose weights are float32 compute in float32 inside; any other as in its run.

    Accelerate puts mixed precision into the `forward` of the model, where no context from outside
    reaches, and keeps the model's own beside it. A model with other weights may not run without
    mixed precision at all, and would be no more exact.

    Args:
        model: The model, not wrapped for several processes.
        mixed: The run's mixed precision, for a model that Accelerate has not prepared yet.
    """
    device = next(model.parameters()).device.type
    forward: Any = vars(model).get("forward")
    own: Any = vars(model).get("_original_forward")
    if not _is_float32(model):
        with torch.autocast(device, dtype=mixed) if mixed and own is None else nullcontext():
            yield
        return
    if own is not None:
        model.forward = own
    try:
        with torch.autocast(device, enabled=False), _exact_products():
            yield
    finally:
        if own is not None:
            model.forward = forward


class Coarsest(TorchFunctionMode):
    """Watches what is computed inside, for floating-point numbers with fewer bits than float32.

    What a module puts out does not tell: a quantised layer multiplies in bfloat16 and hands on
    float32, and its rounding is there all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        """The first coarser one that was seen."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and look at what came out."""
        found = func(*args, **(kwargs or {}))
        if self.dtype is None:
            for value in tree_leaves(found):
                if isinstance(value, Tensor) and _is_coarse(value):
                    self.dtype = value.dtype
        return found


def _is_coarse(value: Tensor) -> bool:
    return value.is_floating_point() and value.element_size() < FLOAT32_BYTES


def _is_float32(model: nn.Module) -> bool:
    """Whether all weights that are numbers as they stand are; quantised ones are codes."""
    return not any(map(_is_coarse, model.parameters()))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 numbers in float32, where the user lets them be rounded (TF32)."""
    backends: Any = torch.backends
    places = [place.matmul for place in (backends.cuda, backends.mkldnn)]
    if not all(hasattr(place, "fp32_precision") for place in places):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    rounded = {place: place.fp32_precision for place in places}
    rounded = {place: value for place, value in rounded.items() if value not in ("ieee", "none")}
    for place in rounded:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in rounded.items():
            place.fp32_precision = value
