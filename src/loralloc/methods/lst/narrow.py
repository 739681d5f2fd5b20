"""The backbone's configuration made narrow: every width divided by the same number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

STEP = 8
"""Widths are multiples of it, so that they split into several heads of even width."""


def head_width(config: Any) -> int:
    """Channels of one attention head."""
    given: int | None = getattr(config, "head_dim", None)
    return given or int(config.hidden_size) // int(config.num_attention_heads)


def side_heads(config: Any, width: int) -> int | None:
    """Heads of side blocks of a width: the most that are possible, up to the backbone's.

    All have the same width, which is even (rotary embeddings turn pairs of channels) and at most
    that of the backbone's heads.

    Returns:
        None where the width cannot be split so.
    """
    for heads in range(int(config.num_attention_heads), 0, -1):
        if width % (2 * heads) == 0 and width // heads <= head_width(config):
            return heads
    return None


def side_widths(config: Any) -> list[int]:
    """The widths that side blocks may have, in ascending order."""
    widths = range(STEP, int(config.hidden_size) + 1, STEP)
    return [width for width in widths if side_heads(config, width)]


def side_inner(config: Any, width: int) -> int:
    """Channels of the feed-forward layers of side blocks, narrowed as the residual stream is."""
    hidden = int(config.hidden_size)
    wide = int(getattr(config, _inner_name(config)) or 4 * hidden)  # GPT-2 leaves it open
    return max(1, round(wide * width / hidden))


def _inner_name(config: Any) -> str:
    return "intermediate_size" if hasattr(config, "intermediate_size") else "n_inner"


def side_config(config: Any, width: int, *, beside: Sequence[int], inner: int | None = None) -> Any:
    """The configuration of side blocks.

    Every head has keys and values of its own, also where the backbone's heads share them.

    Args:
        config: The backbone's.
        width: One of `side_widths`.
        beside: Indices of the backbone's blocks that have a side block. In a cache, side blocks
            come after all of the backbone's.
        inner: Channels of their feed-forward layers; `side_inner` by default.

    Raises:
        ValueError: The width cannot be split into heads.
    """
    heads = side_heads(config, width)
    if heads is None or width % STEP or width > config.hidden_size:
        raise ValueError(
            f"`width` is {width}; for this backbone it must be a multiple of {STEP} up to "
            f"{side_widths(config)[-1]} that splits into heads of even width."
        )
    widths = {
        _inner_name(config): side_inner(config, width) if inner is None else inner,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "num_hidden_layers": config.num_hidden_layers + len(beside),
    }
    narrow = copy.deepcopy(config)
    for name, value in widths.items():
        if hasattr(config, name):
            setattr(narrow, name, value)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        narrow.layer_types = [*kinds, *(kinds[index] for index in beside)]
    return narrow
