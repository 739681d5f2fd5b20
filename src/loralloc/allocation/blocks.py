"""The transformer blocks of a backbone: their list, their linear layers and their sublayers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from loralloc.allocation.layers import base_model

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


def sublayer_linears(model: Any, kind: Kind) -> list[str]:
    """Names of the linear layers of every block that are in its attention, or in its other half.

    Raises:
        TypeError: The blocks are not of a shape that is known.
    """
    parts = [part.owner for part in sublayers(model) if part.kind == "attention"]
    attention = {id(module) for part in parts for module in part.modules()}
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    wanted = attention if kind == "attention" else inside - attention
    return [name for name in linear_names(model) if id(model.get_submodule(name)) in wanted]


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


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers, quantised ones included, in model order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__
    ]


def block_linears(model: nn.Module) -> list[str]:
    """What to adapt by default: every linear layer of every transformer block.

    Names are given from the block on ("self_attn.q_proj"), so that they match in every block and,
    unlike the last component alone, nothing outside the blocks (BERT's pooler is a "dense" too).
    """
    suffixes: dict[str, None] = {}
    for name in linear_names(model):
        parts = name.split(".")
        for index, part in enumerate(parts[1:], start=1):
            parent = model.get_submodule(".".join(parts[:index]))
            if part.isdigit() and isinstance(parent, nn.ModuleList):
                suffixes[".".join(parts[index + 1 :])] = None
                break
    if not suffixes:
        raise ValueError(
            "The model has no list of transformer blocks with linear layers; name the modules to "
            "adapt in `lora_target_modules`."
        )
    return list(suffixes)


def block_list(model: nn.Module, names: Iterable[str]) -> tuple[str, nn.ModuleList] | None:
    """The list of transformer blocks that holds the named modules, with its own name.

    It is the outermost `nn.ModuleList` above them. None where the modules lie in several such
    lists (an encoder and a decoder) or in none.
    """
    inner = base_model(model)
    lists: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            prefix = ".".join(parts[:end])
            if isinstance(inner.get_submodule(prefix), nn.ModuleList):
                lists[prefix] += 1
                break
    if len(lists) != 1:
        return None
    (prefix,) = lists
    return prefix, cast(nn.ModuleList, inner.get_submodule(prefix))


def block_index(name: str, block_list_name: str) -> int | None:
    """The block a module lies in, or None where it lies outside the blocks."""
    start = block_list_name + "."
    return int(name[len(start) :].split(".")[0]) if name.startswith(start) else None


def modules_per_block(model: nn.Module, names: Iterable[str]) -> int:
    """Adapted modules in a block, the largest count where blocks differ (7 in LLaMA).

    Raises:
        ValueError: The model has no single list of blocks.
    """
    names = list(names)
    found = block_list(model, names)
    if found is None:
        raise ValueError(
            "The adapted modules do not lie in one list of transformer blocks, so "
            '`ranks_per_round="block"` has no meaning here; give a number or "model".'
        )
    indices = (block_index(name, found[0]) for name in names)
    counts = Counter(index for index in indices if index is not None)
    return max(counts.values())
