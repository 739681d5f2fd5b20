"""Adapters after each sublayer (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from loralloc.allocation.blocks import Sublayer
from loralloc.methods.bottleneck import Bottleneck, BottleneckMethod, act_sequentially
from loralloc.methods.method import About


@dataclass(kw_only=True)
class Houlsby(BottleneckMethod):
    """y + W_up gelu(W_down y), with y the output of attention or feed-forward before it is summed.

    W_down is drawn from a normal distribution cut off at two standard deviations, W_up is 0.
    """

    activation: str = "gelu"
    """As Transformers names it: "relu", "gelu", "silu" and others."""

    init_std: float = 0.01
    """Standard deviation of W_down at the start; Houlsby et al. 2019, Section 3.6."""

    about: ClassVar[About] = About(
        name="houlsby",
        title="Houlsby-Adapter",
        paper="Houlsby et al. 2019",
        status="faithful",
        initialisation="ours",
        settings="ours",
        learning_rate=3e-4,
        rate_from="the authors' README for MRPC (BERT-base)",
        differs="W_up begins at 0 rather than near it, layer norms stay frozen and there are no "
        "biases unless asked for, as the counts of Liu et al. 2024 have it.",
    )
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 40}

    def place(self, sublayer: Sublayer, adapter: Bottleneck) -> None:
        """See `BottleneckMethod.place`."""
        draw_near_zero(adapter, self.init_std)
        act_sequentially(sublayer, adapter)


def draw_near_zero(adapter: Bottleneck, std: float) -> None:
    """Draw W_down from a normal distribution that is cut off at two standard deviations."""
    nn.init.trunc_normal_(adapter.down, std=std, a=-2 * std, b=2 * std)
