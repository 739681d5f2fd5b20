"""Which modules to adapt: the linear layers of every block, or what the user names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from loralloc.allocation.blocks import block_linears, linear_names


def resolve_targets(model: nn.Module, wanted: Sequence[str] | str | None) -> list[str] | str:
    """What PEFT's `target_modules` should be, with every name checked.

    Args:
        model: The backbone, not yet adapted.
        wanted: Names or endings of names; one string is "all-linear" or a regular expression, as
            in PEFT; None for all linear layers of every block.

    Raises:
        ValueError: A name matches no linear layer.
    """
    if wanted is None:
        return block_linears(model)
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
