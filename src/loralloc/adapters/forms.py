"""The same adapter in the forms that PEFT and servers read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loralloc.adapters.folder import PREFIX, Adapter, LoraModule, anchored

Shape = tuple[int, int]
"""(out_features, in_features)."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is to be written into a folder."""

    config: dict[str, Any]
    """`adapter_config.json`."""

    tensors: dict[str, Tensor]
    """By their names in the file."""


def compact(adapter: Adapter, dtype: torch.dtype | None = None) -> Form:
    """The smallest form, for PEFT: each module has its own rank, by anchored patterns.

    Ranks that are zero in A and in B, which add nothing and could never train, are left out, and
    with them modules that have no others.

    Args:
        adapter: Whose configuration and tensors they are.
        dtype: Of LoRA's tensors; None for what they have.

    Raises:
        ValueError: The adapter is more than LoRA, or nothing of it is left.
    """
    adapter.check_plain()
    modules = {name: _without_dead(module) for name, module in adapter.modules.items()}
    modules = {name: module for name, module in modules.items() if module.rank}
    if not modules:
        raise ValueError(f"Every rank of the adapter in {adapter.path} is zero; it adds nothing.")
    pairs = [(module.rank, _number(module.scaling * module.rank)) for module in modules.values()]
    usual = min(Counter(pairs).items(), key=lambda item: (-item[1], item[0]))[0]
    others = {n: p for n, p in zip(modules, pairs, strict=True) if p != usual}
    config = {
        **adapter.config,
        **_uniform(usual[0], usual[1]),
        "target_modules": sorted(modules),
        "rank_pattern": {anchored(name): rank for name, (rank, _) in others.items()},
        "alpha_pattern": {anchored(name): alpha for name, (_, alpha) in others.items()},
    }
    return Form(config=config, tensors=_tensors(modules, adapter, dtype))


def portable(
    adapter: Adapter,
    shapes: Mapping[str, Shape],
    *,
    rank_multiple: int = 1,
    dtype: torch.dtype | None = None,
) -> Form:
    """The form that loads right everywhere: one rank R, scaling 1, no patterns, no gaps.

    B takes the scaling in, A and B are filled up with zeros to R, and modules of a kind that the
    adapter has, but not in every layer, get zeros. `r = lora_alpha = R`.

    Args:
        adapter: Whose configuration and tensors they are.
        shapes: Of the weights of all linear modules of the backbone, by full name.
        rank_multiple: R is the largest rank, rounded up to a multiple of this.
        dtype: Of LoRA's tensors; None for what they have.

    Raises:
        ValueError: The adapter is more than LoRA, or not one of this backbone.
    """
    adapter.check_plain()
    if rank_multiple < 1:
        raise ValueError(f"`rank_multiple` is {rank_multiple}; it must be at least 1.")
    check_shapes(adapter, shapes)
    largest = max(module.rank for module in adapter.modules.values())
    rank = math.ceil(largest / rank_multiple) * rank_multiple
    kinds = {kind_of(name) for name in adapter.modules}
    like = next(iter(adapter.modules.values())).a
    modules = {}
    for name, (num_out, num_in) in shapes.items():
        if name in adapter.modules:
            modules[name] = _padded(folded(adapter.modules[name]), rank)
        elif kind_of(name) in kinds:
            modules[name] = LoraModule(
                a=like.new_zeros(rank, num_in),
                b=like.new_zeros(num_out, rank),
                scaling=1.0,
                declared_rank=rank,
            )
    config = {
        **adapter.config,
        **_uniform(rank, rank),
        "target_modules": shortest_targets(modules, shapes),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return Form(config=config, tensors=_tensors(modules, adapter, dtype))


def check_shapes(adapter: Adapter, shapes: Mapping[str, Shape]) -> None:
    """Refuse a backbone that the adapter does not fit.

    Raises:
        ValueError: A module is not in it, or has another shape.
    """
    for name, module in adapter.modules.items():
        own = (int(module.b.shape[0]), int(module.a.shape[1]))
        if shapes.get(name) != own:
            has = f"has {shapes[name]} there" if name in shapes else "is no linear layer there"
            raise ValueError(
                f"The adapter in {adapter.path} is not one of this model: {name} of shape {own} "
                f"{has}; name the adapter's own with `--base`."
            )


def folded(module: LoraModule) -> LoraModule:
    """The module with its scaling in B, which is in float32 then."""
    return replace(module, b=module.b.float() * module.scaling, scaling=1.0)


def kind_of(name: str) -> str:
    """The name of a module behind the number of its layer; all of it where it is in none."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if at is None else ".".join([*parts[:at], "*", *parts[at + 1 :]])


def shortest_targets(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """The shortest `target_modules` by which PEFT finds these modules and no others.

    Last words of names ("q_proj"), as servers like them; names within a layer where these find
    others too, and full names where those do.
    """
    wanted, all_names = set(chosen), list(names)
    for shorten in (_last_word, _in_layer):
        targets = {shorten(name) for name in wanted}
        found = {n for n in all_names if any(n == t or n.endswith(f".{t}") for t in targets)}
        if found == wanted:
            return sorted(targets)
    return sorted(wanted)


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


def _in_layer(name: str) -> str:
    return kind_of(name).rpartition("*.")[2]


def _uniform(rank: int, alpha: float) -> dict[str, Any]:
    """What a configuration says of its modules beside their patterns and names."""
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }


def _without_dead(module: LoraModule) -> LoraModule:
    alive = (module.a != 0).any(dim=1) | (module.b != 0).any(dim=0)
    a, b = module.a[alive].contiguous(), module.b[:, alive].contiguous()
    return replace(module, a=a, b=b, declared_rank=int(alive.sum()))


def _padded(module: LoraModule, rank: int) -> LoraModule:
    a = module.a.new_zeros(rank, module.a.shape[1])
    b = module.b.new_zeros(module.b.shape[0], rank)
    a[: module.rank], b[:, : module.rank] = module.a, module.b
    return replace(module, a=a, b=b, declared_rank=rank)


def _tensors(
    modules: Mapping[str, LoraModule], adapter: Adapter, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    found = dict(adapter.others)
    for name, module in modules.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = module.a.to(dtype or module.a.dtype)
        found[f"{PREFIX}{name}.lora_B.weight"] = module.b.to(dtype or module.a.dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _number(value: float) -> float:
    """A whole number as one, as PEFT writes alpha."""
    return round(value) if math.isclose(value, round(value)) and round(value) else value
