"""AdapterDrop (Rücklé et al. 2021): adapters trained so that the lowest blocks can go without."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralloc.methods.blocks import Sublayer, blocks
from loralloc.methods.bottleneck import Bottleneck, act_sequentially
from loralloc.methods.houlsby import Houlsby, draw_near_zero
from loralloc.methods.method import About, Session

MOST_DROPPED = 10 / 12
"""Share of the blocks that a training step leaves without adapters at most."""

MOST_DROPPED_AT_TEST = 5 / 12
"""Share that is left without them for good at most."""


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
    saved.
    """

    dropped_at_test: int = 5
    """First blocks without adapters once training is over, as in the paper's main setting; at most
    5 in 12 of the blocks are left without."""

    _depth: Depth = field(default_factory=Depth, init=False, repr=False, compare=False)
    _generator: torch.Generator | None = field(default=None, init=False, repr=False, compare=False)

    about: ClassVar[About] = About(
        name="adapterdrop",
        title="AdapterDrop",
        paper="Rücklé et al. 2021",
        status="faithful",
        differs="The numbers of blocks are the paper's for 12, as shares of the backbone's.",
    )
    paper: ClassVar[Mapping[str, Any]] = {"bottleneck": 40}

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The number of blocks is negative.
        """
        if self.dropped_at_test < 0:
            raise ValueError(
                f"`dropped_at_test` is {self.dropped_at_test}; it is a number of blocks, 0 for all "
                "adapters."
            )

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

    def state(self) -> Any:
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

    def _draw(self) -> None:
        assert self._generator is not None, "begin() makes it"
        num_blocks = len(blocks(self.model))
        # One block at least keeps its adapters: else nothing would train.
        most = min(round(num_blocks * MOST_DROPPED), num_blocks - 1)
        drawn = torch.randint(most + 1, (), generator=self._generator)
        self._depth.training = int(drawn)

    def _drop_for_good(self) -> None:
        most = int(len(blocks(self.model)) * MOST_DROPPED_AT_TEST)
        self._depth.otherwise = min(self.dropped_at_test, most)


def _unless_dropped(depth: Depth, block: int, adapter: Bottleneck, y: Tensor) -> Tensor | None:
    dropped = depth.training if adapter.training else depth.otherwise
    return None if block < dropped else adapter(y)
