"""AdapterDrop (Rücklé et al. 2021): adapters trained so that the lowest blocks can go without."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralloc.allocation.blocks import Sublayer, blocks
from loralloc.methods.bottleneck import Bottleneck, act_sequentially
from loralloc.methods.houlsby import Houlsby, draw_near_zero
from loralloc.methods.method import About
from loralloc.methods.session import Session


@dataclass(kw_only=True)
class Depth:
    """How many of the first blocks go without their adapters."""

    training: int = 0
    otherwise: int = 0


@dataclass(kw_only=True)
class AdapterDrop(Houlsby):
    """Houlsby's adapters; at every step those of the first n blocks are left out, n drawn anew.

    n is uniform in 0 ... 10 of 12 blocks (of L, as great a share), and no gradient is computed
    below block n. All adapters act while the development set is evaluated in training, and all are
    saved; once training is over the first blocks go without.
    """

    dropped_at_test: int | None = None
    """First blocks without adapters once training is over. None for the paper's main setting: 5,
    and of fewer than 12 blocks as great a share."""

    _depth: Depth = field(default_factory=Depth, init=False, repr=False, compare=False)
    _generator: torch.Generator | None = field(default=None, init=False, repr=False, compare=False)

    about: ClassVar[About] = About(
        name="adapterdrop",
        title="AdapterDrop",
        paper="Rücklé et al. 2021",
        status="faithful",
        initialisation="ours",
        settings="published",
        learning_rate=3e-4,
        rate_from="that of Houlsby et al. 2019, whose adapters it trains",
        differs="Numbers of blocks are the paper's for 12 blocks, as shares of the backbone's. "
        "After training the adapters of the first 5 are left out (`dropped_at_test`).",
    )
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 40}
    leaves_out: ClassVar[bool] = True

    def insert(self, model: Any) -> None:
        """See `InPlaceMethod.insert`.

        Raises:
            ValueError: There are not so many blocks as are to go without.
        """
        dropped, num_blocks = self.dropped_at_test, len(blocks(model))
        if dropped is not None and not 0 <= dropped <= num_blocks:
            raise ValueError(
                f"`dropped_at_test` is {dropped} and the model has {num_blocks} blocks; give a "
                f"number from 0, for all adapters, to {num_blocks}."
            )
        super().insert(model)

    def place(self, sublayer: Sublayer, adapter: Bottleneck) -> None:
        """See `BottleneckMethod.place`."""
        draw_near_zero(adapter, self.init_std)
        change = functools.partial(_unless_dropped, self._depth, sublayer.block, adapter)
        act_sequentially(sublayer, change)

    def begin(self, session: Session) -> None:
        """See `Method.begin`."""
        self._depth.otherwise = 0
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(session.seed)
            self._draw()

    def step(self, number: int) -> None:
        """Draw n for the next step: all its micro-batches, and what is computed again for them."""
        self._draw()

    def finish(self) -> None:
        """See `Method.finish`."""
        self._drop_for_good()

    def load(self, folder: Path) -> None:
        """See `Method.load`; a run that goes on has all adapters again in `begin`."""
        super().load(folder)
        self._drop_for_good()

    def state(self) -> dict[str, Any]:
        """See `Method.state`."""
        generator = self._generator
        return {
            "dropped": self._depth.training,
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state(self, state: Any) -> None:
        """See `Method.load_state`."""
        self._depth.training = state["dropped"]
        if state["generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state["generator"])

    def drop(self, num_blocks: int) -> None:
        """Let the first so many blocks go without their adapters in evaluation; 0: none."""
        self._depth.otherwise = num_blocks

    def _draw(self) -> None:
        assert self._generator is not None, "begin() makes it"
        num_blocks = len(blocks(self.model))
        # One block at least keeps its adapters: else nothing would train.
        most = min(round(num_blocks * 10 / 12), num_blocks - 1)
        drawn = torch.randint(most + 1, (), generator=self._generator)
        self._depth.training = int(drawn)

    def _drop_for_good(self) -> None:
        usual = min(5, len(blocks(self.model)) * 5 // 12)
        self.drop(usual if self.dropped_at_test is None else self.dropped_at_test)


def _unless_dropped(depth: Depth, block: int, adapter: Bottleneck, y: Tensor) -> Tensor | None:
    dropped = depth.training if adapter.training else depth.otherwise
    return None if block < dropped else adapter(y)
