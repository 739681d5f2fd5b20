"""Which consumers would load an adapter folder wrongly, and why, read from the folder alone.

Each consumer is a rule of how it takes ranks and scalings from tensors and configuration; the rules
were read in the consumers' sources, which `docs/serving.md` names, and those of vLLM and llama.cpp
are held against the servers themselves by `experiments/served.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loralloc.adapters.folder import NOT_PLAIN, PLAIN_INITS, Adapter, LoraModule, matching, patterns
from loralloc.adapters.forms import kind_of

LARGEST_VLLM_RANK = 512
"""The largest `--max-lora-rank` that vLLM has."""

DIFFUSION = ("unet.", "transformer.", "down_blocks.", "up_blocks.", "mid_block.")
"""How names of modules begin that diffusers loads."""

DIFFUSION_BLOCKS = ("transformer_blocks.", "down_blocks.", "up_blocks.", "mid_block.")
"""One of which is in them."""

GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", None)
"""Task types that servers of language models load."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that one consumer would do wrongly."""

    consumer: str
    """Its name, one of `CONSUMERS`."""

    reason: str
    """What it does with this folder, in a sentence without the consumer's name."""


_EXPERT = re.compile(r"(.+\.experts\.)\d+(\..+)")

Rule = Callable[[Adapter], Iterator[str]]
"""What a consumer would do wrongly with a folder."""


def lint(adapter: Adapter, *, only: Sequence[str] = ()) -> list[Finding]:
    """What consumers would do wrongly with an adapter.

    Args:
        adapter: As `read_adapter` gives it.
        only: Names of consumers, whatever their case; all by default. Of an adapter that writes no
            text, PEFT alone is asked by default.

    Raises:
        ValueError: There is no consumer of that name.
    """
    by_name = {name.lower(): name for name in CONSUMERS}
    unknown = [name for name in only if name.lower() not in by_name]
    if unknown:
        raise ValueError(
            f"There is no consumer {unknown[0]!r}; use one of {', '.join(map(repr, CONSUMERS))}."
        )
    writes = adapter.config.get("task_type") in GENERATES
    names = [by_name[name.lower()] for name in only] or [
        name for name in CONSUMERS if writes or name.startswith("PEFT")
    ]
    return [
        Finding(consumer=name, reason=why) for name in names for why in CONSUMERS[name](adapter)
    ]


def _peft(adapter: Adapter) -> Iterator[str]:
    for name, module in adapter.modules.items():
        if module.rank != module.declared_rank:
            yield (
                f"refuses to load it: {name} has {module.rank} ranks and the configuration says "
                f"{module.declared_rank} (of keys that match, the first one in a pattern wins)"
            )
            break
    for option, pattern in zip(("rank", "alpha"), patterns(adapter.config), strict=True):
        of_others = {key.partition(".lora_")[0] for key in adapter.others if ".lora_" in key}
        names = (*adapter.modules, *adapter.parameters, *of_others)
        taken = {matching(pattern, name) for name in names}
        for key in pattern:
            if key not in taken:
                yield (
                    f"never uses {key!r} of `{option}_pattern`: it matches no module that an "
                    "earlier key does not match"
                )


def _peft_hotswap(adapter: Adapter) -> Iterator[str]:
    yield from _scaled_wrongly(adapter, _one_scaling(adapter), "does not find patterns (peft#3738)")


def _vllm(adapter: Adapter, *, notices_backbone: bool = True) -> Iterator[str]:
    largest = max(_global_rank(adapter), *adapter.ranks.values(), 0)
    if largest > LARGEST_VLLM_RANK:
        yield f"has ranks up to {LARGEST_VLLM_RANK}, and this adapter {largest}"
    projections: dict[str, set[int]] = {}
    for name, rank in adapter.ranks.items():
        if found := _EXPERT.fullmatch(name):
            projections.setdefault(f"{found[1]}*{found[2]}", set()).add(rank)
    for name, ranks in projections.items():
        if len(ranks) > 1:
            yield (
                f"refuses experts of one layer whose ranks differ: {name} has {min(ranks)} to "
                f"{max(ranks)}"
            )
            break
    if adapter.parameters:
        yield (
            "finds experts that are one parameter in some models only, as gate_up_proj and "
            f"down_proj together: {adapter.parameters[0]}"
        )
    else:
        yield from _more_than_ranks(adapter, notices_backbone=notices_backbone)


def _vllm_before_patterns(adapter: Adapter) -> Iterator[str]:
    yield from _scaled_wrongly(
        adapter, _one_scaling(adapter), "ignores patterns, as older versions do (vllm#59799)"
    )
    yield from _vllm(adapter, notices_backbone=False)


def _vllm_omni(adapter: Adapter) -> Iterator[str]:
    yield from _scaled_wrongly(adapter, _one_scaling(adapter), "ignores patterns")
    r, largest = _global_rank(adapter), max(adapter.ranks.values(), default=0)
    if largest > r:
        yield (
            f"has buffers for `r` = {r} and cannot copy {_widest(adapter)}, which has {largest} "
            "ranks"
        )
    yield from _vllm(adapter, notices_backbone=False)


def _tensorrt_llm(adapter: Adapter) -> Iterator[str]:
    yield from _scaled_wrongly(adapter, _one_scaling(adapter), "takes one `r` for all modules")


def _sglang(adapter: Adapter) -> Iterator[str]:
    alpha, r = _alpha(adapter), _global_rank(adapter)
    other = next((name for name, rank in adapter.ranks.items() if rank != r), None)
    if other:
        yield f"refuses to load it: {other} has {adapter.ranks[other]} ranks, and `r` is {r}"
    yield from _scaled_wrongly(
        adapter, lambda _: alpha / r, "reads neither patterns nor `use_rslora`"
    )


def _tgi(adapter: Adapter) -> Iterator[str]:
    yield from _more_than_ranks(adapter)
    yield from _scaled_wrongly(adapter, _one_scaling(adapter), "ignores patterns")
    kinds: dict[str, dict[int, int]] = {}
    for name, rank in adapter.ranks.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None:
            kinds.setdefault(kind_of(name), {})[layer] = rank
    num_layers = 1 + max((layer for ranks in kinds.values() for layer in ranks), default=-1)
    for kind, ranks in kinds.items():
        if len(set(ranks.values())) > 1:
            yield (
                f"stacks the layers of a kind and cannot: {kind} has ranks from "
                f"{min(ranks.values())} to {max(ranks.values())}"
            )
            break
    for kind, ranks in kinds.items():
        lacking = sorted(set(range(num_layers)) - set(ranks))
        if lacking:
            yield f"drops {kind} in all layers, since layer {lacking[0]} has none"
            break


def _llama_cpp(adapter: Adapter) -> Iterator[str]:
    alpha = _alpha(adapter)
    yield from _scaled_wrongly(
        adapter,
        lambda module: alpha / module.rank,
        "divides `lora_alpha` by each tensor's own rank, and reads no `alpha_pattern` or rsLoRA",
    )
    yield from _more_than_ranks(adapter)


def _diffusers(adapter: Adapter) -> Iterator[str]:
    is_diffusion = all(
        name.startswith(DIFFUSION) and any(block in name for block in DIFFUSION_BLOCKS)
        for name in adapter.modules
    )
    if not is_diffusion or any(key.endswith(".alpha") for key in adapter.others):
        return
    if len(set(adapter.ranks.values())) > 1:
        yield from _scaled_wrongly(
            adapter,
            lambda _: 1.0,
            "takes alpha to be the rank where ranks differ and tensors have no alpha "
            "(diffusers PR#14409)",
        )


CONSUMERS: dict[str, Rule] = {
    "PEFT": _peft,
    "PEFT hotswap": _peft_hotswap,
    "vLLM": _vllm,
    "vLLM 0.31": _vllm_before_patterns,
    "vllm-omni": _vllm_omni,
    "TensorRT-LLM": _tensorrt_llm,
    "SGLang": _sglang,
    "TGI": _tgi,
    "LoRAX": _tgi,
    "llama.cpp": _llama_cpp,
    "diffusers": _diffusers,
}
"""Every consumer with its rule."""


def _scaled_wrongly(
    adapter: Adapter, used: Callable[[LoraModule], float], why: str
) -> Iterator[str]:
    """The first module that a consumer would multiply by something else than PEFT does."""
    for name, module in adapter.modules.items():
        if not math.isclose(used(module), module.scaling, rel_tol=1e-6):
            others = sum(
                not math.isclose(used(m), m.scaling, rel_tol=1e-6) for m in adapter.modules.values()
            )
            more = f" and {others - 1} more" if others > 1 else ""
            yield (
                f"{why}: it scales {name}{more} by {used(module):.4g} in the place of "
                f"{module.scaling:.4g}"
            )
            return


def _one_scaling(adapter: Adapter) -> Callable[[LoraModule], float]:
    r = _global_rank(adapter)
    scaling = _alpha(adapter) / (math.sqrt(r) if adapter.config.get("use_rslora") else r)
    return lambda _: scaling


def _more_than_ranks(adapter: Adapter, *, notices_backbone: bool = False) -> Iterator[str]:
    """What servers refuse or leave out that have a place for ranks on modules only."""
    init = adapter.config.get("init_lora_weights", True)
    if init not in PLAIN_INITS and notices_backbone:
        yield f"refuses `init_lora_weights={init!r}`, which changes the backbone"
    elif init not in PLAIN_INITS:
        yield f"adds it to a backbone that `init_lora_weights={init!r}` has not changed there"
    given = [name for name in NOT_PLAIN if adapter.config.get(name)]
    if given:
        yield f"has no `{given[0]}`"
    elif adapter.config.get("modules_to_save") or adapter.others:
        found = min(adapter.others, default=str(adapter.config.get("modules_to_save")))
        yield f"loads ranks only, and the adapter holds {found} too"


def _widest(adapter: Adapter) -> str:
    return max(adapter.ranks, key=lambda name: adapter.ranks[name])


def _global_rank(adapter: Adapter) -> int:
    return int(adapter.config.get("r", 8))


def _alpha(adapter: Adapter) -> float:
    return float(adapter.config.get("lora_alpha", 8))
