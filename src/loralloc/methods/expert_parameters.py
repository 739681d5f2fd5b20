"""Parameters that PEFT adapts beside linear layers: a mixture's experts and its routers."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from loralloc.allocation.blocks import linear_names


def adapted_parameters(model: nn.Module, wanted: Sequence[str] | str) -> dict[str, int]:
    """The parameters that PEFT adapts by these names, and what one rank of each costs.

    A rank of a parameter of three dimensions is one of every expert (`allocation/experts.py`).

    Args:
        model: The backbone, not yet adapted.
        wanted: Names or endings of names, as PEFT's `target_parameters`.

    Raises:
        ValueError: A name is that of no such parameter.
    """
    costs = _candidates(model)
    found: dict[str, int] = {}
    for target in [wanted] if isinstance(wanted, str) else wanted:
        matching = [name for name in costs if name == target or name.endswith(f".{target}")]
        if not matching:
            raise ValueError(_unknown(model, target, list(costs)))
        found |= {name: costs[name] for name in matching}
    return found


def _candidates(model: nn.Module) -> dict[str, int]:
    """Parameters inside of blocks that are no linear layer's, with the cost of a rank."""
    linears = set(linear_names(model))
    costs = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in linears or parameter.ndim not in (2, 3):
            continue
        if _from_the_block_on(model, name):
            experts = len(parameter) if parameter.ndim == 3 else 1
            costs[name] = experts * sum(parameter.shape[-2:])
    return costs


def _from_the_block_on(model: nn.Module, name: str) -> str:
    """A parameter's name within its block; "" outside of blocks."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[end + 1 :])
    return ""


def _unknown(model: nn.Module, target: str, names: Sequence[str]) -> str:
    endings = list(dict.fromkeys(_from_the_block_on(model, name) for name in names))
    if not endings:
        return (
            f"`lora_target_parameters` names {target!r}, and the {type(model).__name__} has no "
            "experts that are one parameter; leave it out, and name linear layers in "
            "`lora_target_modules`."
        )
    near = get_close_matches(target, endings, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(endings)}."
    return f"`lora_target_parameters` names {target!r}, which matches no such parameter; {hint}"
