"""LoRA on one kind of sublayer alone, at the parameters that LoRA has everywhere: two controls.

An allocation that does no better than the better of the two has found nothing but a kind of module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from loralloc.allocation.blocks import Kind, sublayer_linears
from loralloc.methods.lora import CONTROL
from loralloc.methods.method import About
from loralloc.methods.peft_method import LoraShaped, resolve_targets


@dataclass(kw_only=True)
class SublayerLora(LoraShaped):
    """LoRA of one rank on every linear layer of one kind of sublayer."""

    kind: ClassVar[Kind]
    equal_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse modules by name.

        Raises:
            ValueError: Some were named.
        """
        if self.targets is not None:
            raise ValueError(
                f"`lora_target_modules` is {self.targets!r}, but {self.about.name} names the "
                "modules itself; leave it out, or use lora."
            )

    def targeted(self, model: nn.Module) -> Sequence[str] | str:
        """See `LoraShaped.targeted`.

        Raises:
            ValueError: There is no such linear layer.
        """
        endings = tuple(resolve_targets(model, None))
        names = [
            name
            for name in sublayer_linears(model, self.kind)
            if name.endswith(tuple(f".{ending}" for ending in endings))
        ]
        if not names:
            what = self.kind.replace("_", "-")
            raise ValueError(
                f"The {what} sublayers of {type(model).__name__} have no linear layer that PEFT "
                f"adapts by name, so there is nothing for {self.about.name} to train; use lora."
            )
        return names


@dataclass(kw_only=True)
class MlpOnly(SublayerLora):
    """LoRA on the linear layers of feed-forward sublayers."""

    about: ClassVar[About] = dataclasses.replace(
        CONTROL,
        name="mlp-only",
        title="LoRA, feed-forward only",
        differs="LoRA whose rank is that at which the feed-forward layers alone have the budget.",
    )
    kind: ClassVar[Kind] = "feed_forward"


@dataclass(kw_only=True)
class AttentionOnly(SublayerLora):
    """LoRA on the linear layers of attention sublayers."""

    about: ClassVar[About] = dataclasses.replace(
        CONTROL,
        name="attention-only",
        title="LoRA, attention only",
        differs="LoRA whose rank is that at which the attention layers alone have the budget.",
    )
    kind: ClassVar[Kind] = "attention"
