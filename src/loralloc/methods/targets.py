"""Which modules to adapt: the linear layers of every block, or what the user names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from loralloc.allocation.blocks import block_linears, linear_names


def resolve_targets(model: nn.Module, wanted: Sequence[str] | str | None) -> list[str] | str:
    """What PEFT's `target_modules` should be, with every name checked.

    Args:
        model: The backbone, not yet adapted.
        wanted: Names or endings of names; one string is "all-linear" or a regular expression, as
            in PEFT; None for all linear layers of every block that PEFT can adapt.

    Raises:
        ValueError: A name matches no linear layer, or PEFT would adapt parameters by it.
    """
    if wanted is None:
        return _plain_linears(model)
    targets = _checked(model, wanted)
    experts = _experts_named(model, targets)
    if experts:
        raise ValueError(
            f"`lora_target_modules` is {wanted!r}, by which PEFT would adapt the experts of the "
            f"{type(model).__name__} too ({experts}), which are parameters, and ranks are those of "
            f"linear layers; use {', '.join(_plain_linears(model))}."
        )
    return targets


def _experts_named(model: nn.Module, targets: Sequence[str] | str) -> str:
    """The experts that PEFT would adapt by these names of modules, for people; "" for none."""
    try:
        return ", ".join(sorted(_as_peft_reads(model, targets).target_parameters or ()))
    except ValueError as error:  # it names one of two layers that are one parameter now
        return str(error).rstrip(".")


def _plain_linears(model: nn.Module) -> list[str]:
    """The linear layers of every block, without those whose names PEFT takes for experts'."""
    names = block_linears(model)
    left = _as_peft_reads(model, names).target_modules or ()
    return [name for name in names if name in left]


def _as_peft_reads(model: nn.Module, targets: Sequence[str] | str) -> LoraConfig:
    """PEFT's configuration once it has made names of modules into names of parameters.

    Since Transformers 5 all experts of a block are one parameter, and PEFT reads the names of the
    linear layers that they once were, wherever in the model these occur, as names of it.
    """
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    convert_peft_config_for_transformers(config, model, None)
    return config


def _checked(model: nn.Module, wanted: Sequence[str] | str) -> list[str] | str:
    if isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted):
        wanted = [wanted]  # TRL's ModelConfig makes a string of a list of one
    if isinstance(wanted, str) or list(wanted) == ["all-linear"]:
        return wanted if isinstance(wanted, str) else "all-linear"
    names = linear_names(model)
    leaves = {name.rpartition(".")[2] for name in names}
    for target in wanted:
        if any(name == target or name.endswith("." + target) for name in names):
            continue
        near = get_close_matches(target, sorted(leaves | set(block_linears(model))), n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else (f"linear layers end in {', '.join(sorted(leaves))}.")
        )
        raise ValueError(f"`lora_target_modules` names {target!r}, which matches no module; {hint}")
    return list(wanted)
