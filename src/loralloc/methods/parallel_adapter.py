"""Adapters beside each sublayer (He et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loralloc.allocation.blocks import Sublayer
from loralloc.methods.bottleneck import Bottleneck, BottleneckMethod, act_in_parallel
from loralloc.methods.method import About


@dataclass(kw_only=True)
class ParallelAdapter(BottleneckMethod):
    """y + s W_up relu(W_down x), with x the input of attention or feed-forward and y its output.

    x is what the sublayer itself reads: normalised in Llama and GPT-2. W_down is Kaiming-uniform,
    W_up is 0.
    """

    scale: float = 1.0
    """s."""

    ffn_scale: float | None = None
    """s in the feed-forward layers; None for `scale`. The scaled parallel adapter of He et al. 2021
    has 4 for summaries and translation, 2 on GLUE."""

    about: ClassVar[About] = About(
        name="parallel-adapter",
        title="Parallel-Adapter",
        paper="He et al. 2021",
        status="faithful",
        initialisation="published",
        settings="published",
        learning_rate=1e-4,
        rate_from="the authors' script for SST-2 (RoBERTa-base)",
        differs="It stands beside the whole of attention, as in the paper's figure; its code adds "
        "it before the output projection.",
    )
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 40}

    def place(self, sublayer: Sublayer, adapter: Bottleneck) -> None:
        """See `BottleneckMethod.place`."""
        own = self.ffn_scale if sublayer.kind == "feed_forward" else None
        adapter.scale = self.scale if own is None else own
        act_in_parallel(sublayer, adapter)
