"""Gradients of frozen weights, from what goes into a layer and what comes back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[str, Tensor], None]


class WeightGradients(AbstractContextManager["WeightGradients"]):
    """Tells dL/dW of linear layers in every backward pass, batch by batch, until it is closed.

    With x the inputs of a layer and dL/dy the gradients of its outputs, both over all tokens, it is
    (dL/dy)^T x, whatever the layer adds to W x: the gradient of any W' that is added to W too.

    Args:
        layers: By name, modules whose first input is x and whose output is y.
        see: Called with the name and the gradient, shape (out_features, in_features), in float32.
    """

    def __init__(self, layers: Mapping[str, nn.Module], see: See) -> None:
        self._see = see
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def close(self) -> None:
        """See no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # of a pass without a graph
                return
            x = inputs[0].detach()

            def back(gradient: Tensor) -> None:
                with torch.no_grad():
                    dy = gradient.reshape(-1, gradient.shape[-1]).float()
                    self._see(name, dy.T @ x.reshape(-1, x.shape[-1]).float())

            output.register_hook(back)  # type: ignore[no-untyped-call]

        return hook
