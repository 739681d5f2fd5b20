"""Where a backbone's blocks and their two sublayers are, in Llama's, GPT-2's and BERT's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["attention", "feed_forward"]


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """The attention or feed-forward part of a block, between two residual sums."""

    kind: Kind
    block: int
    """Index of its block."""

    owner: nn.Module
    """The module that stands for it, where a method may register its own modules."""

    reads: nn.Module
    """The module whose first input is the sublayer's input: normalised first in Llama and GPT-2."""

    writes: nn.Module
    """The module whose output (or its first part) is added to the residual stream; BERT normalises
    the sum."""


def backbone(model: Any) -> Any:
    """The model without its head, as Transformers names it."""
    return model.base_model


def hidden_size(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.config.hidden_size)


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks, in order.

    Raises:
        TypeError: The model has no single list of blocks.
    """
    inner = backbone(model)
    for path in ("layers", "h", "encoder.layer"):
        found: Any = inner
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise TypeError(
        f"{type(model).__name__} has no list of blocks as Llama, GPT-2 or BERT has, so only "
        "methods on linear layers (such as lora) can adapt it."
    )


def sublayers(model: Any) -> list[Sublayer]:
    """Attention and feed-forward of every block, in the order they are run.

    Raises:
        TypeError: The blocks are not of a shape that is known.
    """
    return [part for index, block in enumerate(blocks(model)) for part in _of_block(index, block)]


def _of_block(index: int, block: Any) -> tuple[Sublayer, Sublayer]:
    if hasattr(block, "self_attn") and hasattr(block, "mlp"):  # Llama and its many relatives
        places = (block.self_attn,) * 3, (block.mlp,) * 3
    elif hasattr(block, "attn") and hasattr(block, "mlp"):  # GPT-2
        places = (block.attn,) * 3, (block.mlp,) * 3
    elif hasattr(block, "attention") and hasattr(block, "intermediate"):  # BERT, RoBERTa
        attention, output = block.attention, block.output
        places = (
            (attention, attention, attention.output.dense),
            (output, block.intermediate, output.dense),
        )
    else:
        raise TypeError(
            f"A {type(block).__name__} is no block of a shape that is known (Llama, GPT-2, BERT), "
            "so adapters have no place in it; use a method on linear layers, such as lora."
        )
    attention, feed_forward = places
    return (
        _sublayer("attention", index, *attention),
        _sublayer("feed_forward", index, *feed_forward),
    )


def _sublayer(
    kind: Kind, block: int, owner: nn.Module, reads: nn.Module, writes: nn.Module
) -> Sublayer:
    return Sublayer(kind=kind, block=block, owner=owner, reads=reads, writes=writes)
