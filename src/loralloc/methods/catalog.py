"""Every method by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from loralloc.allocation import named
from loralloc.methods.method import Method

METHODS = {
    "lora": "lora:Lora",
    "alora": "alora:Alora",
    "alora-dnas": "alora:AloraDnas",
    "alora-sensi": "alora:AloraSensi",
    "random": "controls:RandomRounds",
    "inverse": "controls:InverseRounds",
    "mlp-only": "sublayer_lora:MlpOnly",
    "attention-only": "sublayer_lora:AttentionOnly",
    "prune": "prune:Prune",
    "truncate": "truncate:Truncate",
    "pattern": "pattern:Pattern",
    "dora": "dora:Dora",
    "rslora": "rslora:RsLora",
    "lora-plus": "lora_plus:LoraPlus",
    "pissa": "pissa:Pissa",
    "adalora": "adalora:AdaLora",
    "sora": "sora:Sora",
    "salora": "salora:SaLora",
    "ssp": "ssp.method:Ssp",
    "p-tuning-v2": "p_tuning:PTuning",
    "spt": "spt.method:Spt",
    "houlsby": "houlsby:Houlsby",
    "parallel-adapter": "parallel_adapter:ParallelAdapter",
    "adapterdrop": "adapterdrop:AdapterDrop",
    "lst": "lst.method:Lst",
    "learned-adapter": "learned_adapter.method:LearnedAdapter",
    "bitfit": "bitfit:BitFit",
    "full": "full:Full",
}
"""Module and class of each, imported when they are asked for."""


def get_method(name: str) -> type[Method]:
    """The method of this name; one of your own as "package.module:Class".

    Raises:
        ValueError: There is none, or what is there is no method.

    Example:
        >>> get_method("sora")(rank=4).about.title
        'SoRA'
    """
    return _own_method(name) if ":" in name else built_in_method(name)


def built_in_method(name: str) -> type[Method]:
    """The method of ours of this name: what a file may name, since it imports nothing else.

    Raises:
        ValueError: There is none.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(METHODS)}."
        raise ValueError(f"There is no method {name!r}; {hint}")
    module, _, class_name = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(f"loralloc.methods.{module}"), class_name)
    return found


def _own_method(name: str) -> type[Method]:
    """A method that is not ours."""
    found: Any = named.load("method", name, {})
    if not (isinstance(found, type) and issubclass(found, Method)) or not hasattr(found, "about"):
        raise ValueError(
            f"{name} is no method: it must be a subclass of loralloc.Method with its `about`."
        )
    return found
