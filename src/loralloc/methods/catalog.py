"""Every method by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from loralloc.allocation import named
from loralloc.methods.method import About, Method

METHODS = {
    "lora": "lora:Lora",
    "alora": "alora:Alora",
    "alora-dnas": "alora_variants:AloraDnas",
    "alora-sensi": "alora_variants:AloraSensi",
    "shrink": "shrink:Shrink",
    "random": "controls:RandomRounds",
    "inverse": "controls:InverseRounds",
    "mlp-only": "sublayer_lora:MlpOnly",
    "attention-only": "sublayer_lora:AttentionOnly",
    "prune": "prune:Prune",
    "truncate": "truncate:Truncate",
    "pattern": "pattern:Pattern",
    "eva": "eva:Eva",
    "gora": "gora:Gora",
    "elalora": "elalora:ElaLora",
    "l1ra": "l1ra:L1Ra",
    "increlora": "increlora:IncreLora",
    "igu-lora": "igu_lora:IguLora",
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


def learning_rates(about: About, num_trials: int = 5) -> list[float]:
    """Rates to search among, by half powers of ten around a method's own: each has equally many.

    Args:
        about: The method's.
        num_trials: How many, an odd number, so that its own is in the middle.

    Raises:
        ValueError: The method recommends no rate, or the number is even.

    Example:
        >>> learning_rates(get_method("lora").about)
        [5e-05, 0.00016, 0.0005, 0.0016, 0.005]
    """
    if about.learning_rate is None:
        raise ValueError(
            f"{about.name} recommends no learning rate to search around; give its `about` a "
            "`learning_rate`, or name the rates to try."
        )
    if num_trials < 1 or num_trials % 2 == 0:
        raise ValueError(f"`num_trials` is {num_trials}; it must be an odd number of at least 1.")
    half = num_trials // 2
    return [
        float(f"{about.learning_rate * 10 ** (step / 2):.2g}") for step in range(-half, half + 1)
    ]


def _own_method(name: str) -> type[Method]:
    """A method that is not ours."""
    found: Any = named.load("method", name, {})
    if not (isinstance(found, type) and issubclass(found, Method)) or not hasattr(found, "about"):
        raise ValueError(
            f"{name} is no method: it must be a subclass of loralloc.Method with its `about`."
        )
    return found
