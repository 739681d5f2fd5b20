"""LST: ladder side-tuning (Sung et al. 2022), which trains without a graph of the backbone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from loralloc.allocation.blocks import blocks
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.lst.ladder import Ladder
from loralloc.methods.lst.narrow import side_inner, side_widths
from loralloc.methods.lst.prune import prune_into
from loralloc.methods.method import About
from loralloc.methods.session import Session

Init = Literal["pruned", "random"]
"""What a side network begins as: the largest weights of the backbone, or weights drawn anew."""


@dataclass(kw_only=True)
class Lst(InPlaceMethod):
    """A narrow network reads the output of every block, and its own takes the place of the last.

    Gradients flow through the side network and the head only: of the backbone, a training step
    keeps nothing but what the side network reads. The equations are in `lst_ladder`.
    """

    width: int | None = None
    """Channels of the side network, a multiple of 8. None for what the budget allows."""

    inner: int | None = None
    """Channels of its feed-forward layers. None for narrower than the backbone's by the same factor
    as `width`, and where that is chosen by a budget, for what fits the budget best."""

    drop_every: int | None = None
    """Every n-th block has no side block, from the first on; None where all have one."""

    init: Init = "pruned"
    """What side blocks begin as: "pruned" (the largest weights of the backbone) or "random"."""

    about: ClassVar[About] = About(
        name="lst",
        title="LST",
        paper="Sung et al. 2022",
        status="port",
        initialisation="ours",
        settings="published",
        learning_rate=3e-3,
        rate_from="the authors' code (T5)",
        differs="From an encoder-decoder (T5) to decoders and encoders. The side network begins as "
        "the backbone's largest weights by their sum of magnitudes, not by Fisher information. It "
        "wants a learning rate of 1e-3 or more.",
        starts_as_base=False,
        why_not_base="the output of the side network takes the place of the backbone's",
    )
    size: ClassVar[str] = "width"
    # 21.28M parameters on LLaMA-2-7B, where Table 1 has 21.1M, which no whole width gives.
    paper: ClassVar[Mapping[str, Any]] = {"width": 128, "drop_every": 8}

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: One is none of its values.
        """
        if self.drop_every is not None and self.drop_every < 2:
            raise ValueError(
                f"`drop_every` is {self.drop_every}, which leaves no side block; it must be at "
                "least 2."
            )
        if self.inner is not None and self.inner < 1:
            raise ValueError(f"`inner` is {self.inner}; it must be at least 1.")
        if self.init not in get_args(Init):
            raise ValueError(f"`init` is {self.init!r}; it must be 'pruned' or 'random'.")

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        beside = self._beside(model)
        with torch.device("meta"):
            ladders = [
                Ladder(model, width=size, beside=beside[:number], inner=self.inner)
                for number in (1, 2)
            ]
        one, two = (sum(p.numel() for p in ladder.parameters()) for ladder in ladders)
        return one + (len(beside) - 1) * (two - one)

    def fit(self, model: Any, budget: int) -> None:
        """See `Method.fit`."""
        if self.width is not None:
            return
        widths = side_widths(model.config)
        at = bisect_left(widths, budget, key=lambda width: self.count(model, width))
        nearest = widths[max(0, at - 1) : at + 1]
        counts = {width: self.count(model, width) for width in nearest}
        best = min(counts, key=lambda width: abs(counts[width] - budget))
        if counts[best] > 2 * budget:
            raise ValueError(
                f"The budget is {budget:,} parameters, but lst with the smallest `width` of {best} "
                f"has {counts[best]:,} already; raise `--budget`."
            )
        self.width = best
        if self.inner is None:
            self._fit_inner(model, budget)

    def _fit_inner(self, model: Any, budget: int) -> None:
        """Widths lie far apart; what they leave of a budget is made up for between two of them."""
        assert self.width is not None
        usual = side_inner(model.config, self.width)
        has = self.count(model, self.width)
        self.inner = usual + 1
        each = self.count(model, self.width) - has
        most = side_inner(model.config, model.config.hidden_size)  # the backbone's own
        self.inner = min(max(1, usual + round((budget - has) / each)), most)

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        assert self.width is not None, "fit() chooses it"
        ladder = Ladder(model, width=self.width, beside=self._beside(model), inner=self.inner)
        ladder.to(next(model.parameters()).device)
        if self.init == "pruned":
            prune_into(ladder, model)
        ladder.attach(model)

    def begin(self, session: Session) -> None:
        """See `Method.begin`.

        Raises:
            ValueError: Activations are to be computed again in the backward pass.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "`gradient_checkpointing` saves nothing with lst, whose backward pass does not "
                "enter the backbone; leave it out."
            )

    def _beside(self, model: Any) -> list[int]:
        """Indices of the blocks that have a side block."""
        every = self.drop_every
        return [i for i in range(len(blocks(model))) if every is None or i % every]
