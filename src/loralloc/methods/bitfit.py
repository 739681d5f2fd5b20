"""BitFit (Ben Zaken et al. 2022): only biases train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from loralloc.allocation.blocks import backbone, blocks
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.method import About

SHIFT = "bias_shift"
"""The name under which a module holds what its bias is changed by."""


@dataclass(kw_only=True)
class BitFit(InPlaceMethod):
    """b + db for every bias b of the backbone, with db zero at the start and trained in float32.

    Where it has none, as Llama, every linear layer of its blocks is given one.
    """

    about: ClassVar[About] = About(
        name="bitfit",
        title="BitFit",
        paper="Ben Zaken et al. 2022",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=1e-3,
        rate_from="the default of the authors' script for GLUE (BERT-base)",
        differs="Where there are no biases, as in Llama, the blocks' linear layers are given some.",
        merges=True,
    )
    size: ClassVar[str] = ""

    _hooks: list[RemovableHandle] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        return sum(_width(module) for module in shifted(model))

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        self._hooks = []
        for module in shifted(model):
            shift = torch.zeros(_width(module), device=_weight(module).device)
            module.register_parameter(SHIFT, nn.Parameter(shift))
            self._hooks.append(module.register_forward_hook(_shift))

    def merge(self) -> Any:
        """See `Method.merge`.

        Raises:
            ValueError: The backbone has no biases, and its configuration has no word for them.
        """
        config = self.model.config
        modules = [module for module in self.model.modules() if hasattr(module, SHIFT)]
        if any(module.bias is None for module in modules):
            if not (hasattr(config, "attention_bias") and hasattr(config, "mlp_bias")):
                raise ValueError(
                    f"A {type(self.model).__name__} has no biases and its configuration cannot ask "
                    "for any, so it would be opened without them; keep bitfit as an adapter."
                )
            config.attention_bias = config.mlp_bias = True
        for module in modules:
            shift = getattr(module, SHIFT).detach()
            bias = shift if module.bias is None else module.bias.detach() + shift
            module.bias = nn.Parameter(bias.to(_weight(module).dtype), requires_grad=False)
            delattr(module, SHIFT)
        for hook in self._hooks:
            hook.remove()
        return self.model


def shifted(model: Any) -> list[Any]:
    """The modules whose biases train, in model order."""
    everywhere = backbone(model).modules()
    biased = [m for m in everywhere if isinstance(getattr(m, "bias", None), Tensor)]
    return biased or [m for m in blocks(model).modules() if isinstance(m, (nn.Linear, Conv1D))]


def _shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    shift: Tensor = getattr(module, SHIFT)
    return output + shift.to(output.dtype)


def _width(module: Any) -> int:
    return int(module.out_features if module.bias is None else module.bias.numel())


def _weight(module: Any) -> Tensor:
    found: Tensor = module.weight
    return found
