"""Skipping the blocks before a module by giving back what they put out before.

The rest of the model runs as it is, so nothing need be known about its embeddings, masks or head.
Modules outside the blocks, or a model with several lists of blocks, skip nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from loralloc.allocation.blocks import block_index, block_list


class Prefix:
    """The blocks of a model, for forward passes that begin in the midst of them.

    Args:
        model: The adapted model.
        names: Its adapted modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        found = block_list(model, names)
        self._list_name, self._blocks = found if found else ("", nn.ModuleList())

    @property
    def num_blocks(self) -> int:
        """How many blocks there are; 0 where nothing can be skipped."""
        return len(self._blocks)

    def block(self, name: str) -> int | None:
        """The block that holds a module, or None where it lies outside the blocks."""
        return block_index(name, self._list_name) if self._list_name else None

    @contextmanager
    def recording(self) -> Iterator[dict[int, Any]]:
        """Keep what each block puts out, by its index."""
        outputs: dict[int, Any] = {}

        def keep(index: int) -> Any:
            return lambda _module, _args, output: outputs.update({index: output})

        handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(self._blocks)]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, output: Any, *, before: int) -> Iterator[None]:
        """Let no block before the one of that index compute; the last of them puts `output` out."""
        skipped = list(self._blocks)[:before]
        own = [vars(block).get("forward") for block in skipped]
        for block in skipped:
            block.forward = lambda *_, **__: output  # only the last one's output is read
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
