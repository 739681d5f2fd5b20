"""LST: ladder side-tuning (Sung et al. 2022), a side network that needs no graph of the backbone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from loralloc.methods.blocks import blocks
from loralloc.methods.in_place import InPlaceMethod
from loralloc.methods.lst_ladder import Ladder
from loralloc.methods.lst_narrow import STEP, side_widths
from loralloc.methods.lst_prune import prune_into
from loralloc.methods.method import About, Session


@dataclass(kw_only=True)
class Lst(InPlaceMethod):
    """A narrow copy of the backbone reads the outputs of all blocks and replaces the last.

    Gradients flow through the side network and the head only, so a training step holds nothing of
    the backbone but what the side network reads. See `lst_ladder` for the equations.
    """

    width: int | None = None
    """Channels of the side network, a multiple of 8; its feed-forward layers are narrower than the
    backbone's in the same proportion. None for what the budget allows."""

    drop_every: int | None = None
    """Leave out the side block of every n-th block, from the first on; None for none of them."""

    init: Literal["pruned", "random"] = "pruned"
    """What the side network begins as: the largest weights of the backbone, or random ones."""

    about: ClassVar[About] = About(
        name="lst",
        title="LST",
        paper="Sung et al. 2022",
        status="port",
        differs="",
        starts_as_base=False,
        why_not_base="the side network's output takes the place of the backbone's",
    )
    size: ClassVar[str] = "width"
    paper: ClassVar[Mapping[str, Any]] = {"width": 128, "drop_every": 8}

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`."""
        with torch.device("meta"):
            ladder = self._ladder(model, size)
        return sum(parameter.numel() for parameter in ladder.parameters())

    def fit(self, model: Any, budget: int) -> None:
        """See `Method.fit`."""
        if self.width is not None:
            return
        widths = side_widths(model.config)
        at = bisect_left(widths, budget, key=lambda width: self.count(model, width))
        near = widths[max(0, at - 1) : at + 1]
        best = min(near, key=lambda width: abs(self.count(model, width) - budget))
        if self.count(model, best) > 2 * budget:
            raise ValueError(
                f"The budget is {budget:,} parameters, but lst with `width` of {best}, the smallest, has "
                f"{self.count(model, best):,} already; raise `--budget`."
            )
        self.width = best

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`."""
        assert self.width is not None, "fit() chooses it"
        ladder = self._ladder(model, self.width)
        if self.init == "pruned":
            prune_into(ladder, model)
        ladder.to(next(model.parameters()).device)
        ladder.attach(model)

    def _ladder(self, model: Any, width: int) -> Ladder:
        step = self.drop_every
        beside = [i for i in range(len(blocks(model))) if step is None or i % step]
        return Ladder(model, width=width, beside=beside)
