"""Skipping the blocks before a module by giving back what they put out before.

The rest of the model runs as it is, so nothing need be known about its embeddings, masks or head.
Nothing is skipped before modules outside the blocks, in a model with several lists of blocks, or
where a block's output is not all that the blocks after it read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Cache

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
    def recording(self) -> Iterator[Recording]:
        """Keep what each block puts out, and whether that is all it does."""
        recording = Recording(self)
        handles = []
        for index, block in enumerate(self._blocks):
            handles += [
                block.register_forward_pre_hook(recording.enter, with_kwargs=True),
                block.register_forward_hook(recording.leaver(index), with_kwargs=True),
            ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, recording: Recording, *, before: int) -> Iterator[None]:
        """Let no block before the one of that index compute: each gives back what it put out.

        Args:
            recording: What they put out.
            before: The first block that computes.
        """
        skipped = list(self._blocks)[:before]
        own = [vars(block).get("forward") for block in skipped]

        def giving_back(index: int) -> Any:
            return lambda *_, **__: recording.outputs[index]

        for index, block in enumerate(skipped):
            block.forward = giving_back(index)
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


class Recording:
    """What the blocks put out in one forward pass.

    Args:
        prefix: The blocks.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.outputs: dict[int, Any] = {}
        self._prefix = prefix
        self._is_whole = True
        self._handed: dict[int, Any] = {}

    def start(self, name: str) -> int:
        """The first block that has to compute where this module is changed.

        The first of all where blocks hand on more than they put out, as keys and values that later
        ones share, or put out something else a second time, as in a loss that compares two passes.
        """
        return (self._prefix.block(name) or 0) if self._is_whole else 0

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the containers that a block is handed, as they are before it runs."""
        self._handed = {id(x): _contents(x) for x in (*args, *kwargs.values()) if _can_change(x)}

    def leaver(self, index: int) -> Any:
        """A hook that keeps the output of the block of that index."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            handed = (*args, *kwargs.values())
            if any(isinstance(x, Cache) for x in handed):
                self._is_whole = False
            if any(_contents(x) != self._handed.get(id(x)) for x in handed if _can_change(x)):
                self._is_whole = False
            if not _is_same(self.outputs.setdefault(index, output), output):
                self._is_whole = False

        return leave


def _can_change(value: Any) -> bool:
    return isinstance(value, (MutableMapping, MutableSequence))


def _is_same(first: Any, second: Any) -> bool:
    """Whether two outputs of a block are equal."""
    if first is second:
        return True
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all((isinstance(x, Tensor) and torch.equal(x, y)) or x is y for x, y in pairs)


def _contents(value: Any) -> list[tuple[Any, int]]:
    """What a container holds, told by identity."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [(key, id(item)) for key, item in items]
