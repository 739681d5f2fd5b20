"""From the settings of a run to its method, and to a backbone adapted by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator
from torch import nn

from loralloc.allocation.layers import base_model
from loralloc.kernels.attention import use_short_attention
from loralloc.kernels.lora import fuse
from loralloc.methods.catalog import get_method
from loralloc.methods.method import Method
from loralloc.methods.peft_method import (
    LoraShaped,
    PeftMethod,
    default_budget,
)
from loralloc.runs.arguments import BLOCK, OPTIONS
from loralloc.runs.heads.head import Head
from loralloc.runs.models import load_with_new_head
from loralloc.runs.settings import Settings

Backbone = Callable[..., tuple[Any, list[str]]]
"""Loads a backbone as `models.load_with_new_head` does, with the names of what is new in it."""

LORA_FLAGS = {
    "lora_r": "rank",
    "lora_alpha": "scale",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "lora_target_parameters": "parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_modules_to_save": "targets",
}
"""TRL's names of LoRA's options and the fields of methods on linear layers."""


def method_of(settings: Settings) -> Method:
    """The method that a run asks for, with the options it was given; its size may be open.

    Raises:
        ValueError: There is no such method or option, or an option could not take effect.
    """
    if settings.gives("use_peft") and not settings.model.use_peft:
        raise ValueError("`use_peft` is false; choose with `--method` how the model is adapted.")
    run = settings.run
    kind = get_method(run.method)
    fields = set(kind.option_names())
    values = {**_lora_values(settings, kind, fields), **_own_values(settings, kind, fields)}
    if kind.allocates:
        values["allocation"] = settings.allocation
    else:
        _refuse_allocation(settings)
    if run.paper and run.budget is not None:
        raise ValueError(
            "`--paper` sets the size of the paper's comparison and `--budget` another; leave out "
            "one of the two."
        )
    if run.paper:
        if not kind.paper:
            raise ValueError(f"The paper gives no setting for {run.method}; leave out `--paper`.")
        values.update(kind.paper)
    size = values.get(kind.size)
    if size is not None and size < 1:
        raise ValueError(f"`{OPTIONS}.{kind.size}` is {size}; it must be at least 1.")
    is_open = kind.size and size is None and not values.get("native")
    if run.budget is not None and (run.budget < 1 or not is_open):
        raise ValueError(_budget_sentence(settings, kind))
    return kind(**values)


def adapt(
    settings: Settings,
    method: Method,
    head: Head,
    *,
    load: Backbone = load_with_new_head,
    **options: Any,
) -> Any:
    """The backbone with its head, adapted and ready to train fast.

    Args:
        settings: Of the run.
        method: How it is adapted.
        head: What it is adapted for; one that is new trains too.
        load: What loads it, as `load_with_new_head` does.
        options: How the backbone is loaded; see `load_model`.

    Raises:
        ValueError: There is no such model, or the method does not fit it.
    """
    name = settings.model.model_name_or_path
    model, new = load(str(name), head=head, **options)
    check_quantised(method, model)
    fit(method, model, settings.run.budget)
    heads = [*new, *(settings.model.lora_modules_to_save or ())]
    model = method.prepare(model, task_type=head.task_type, heads=heads)
    fuse(model)
    use_short_attention(base_model(model))
    return model


def fit(method: Method, model: nn.Module, budget: int | None) -> None:
    """Choose a method's size for a backbone, where it is open.

    Args:
        method: With the options it was given.
        model: The backbone, not yet adapted.
        budget: Parameters; by default those of LoRA with 8 ranks on every linear layer of every
            block (the paper's comparison).
    """
    budget = default_budget(model) if budget is None else budget
    is_open = method.size and getattr(method, method.size) is None
    method.fit(model, budget)
    if is_open:
        method.sized_for = budget
    elif isinstance(method, LoraShaped):  # LoRA's parameters at the rank that was given
        method.sized_for = method.chosen_size() * method.rank_cost(model)
    elif method.size:
        method.sized_for = method.count(model, method.chosen_size())
    if method.size:
        method.counted = method.count(model, method.chosen_size())


def check_quantised(method: Method, model: Any) -> None:
    """Refuse what Transformers would, before anything is trained.

    Raises:
        ValueError: The backbone is quantised and the method is not one on linear layers.
    """
    if getattr(model, "is_quantized", False) and not isinstance(method, PeftMethod):
        raise ValueError(
            f"{method.about.name} puts modules of its own into the backbone, which Transformers "
            "does not train where it is quantised; use a method of PEFT's, such as lora, or leave "
            "out the quantisation."
        )


def _lora_values(settings: Settings, kind: type[Method], fields: set[str]) -> dict[str, Any]:
    """TRL's LoRA flags as options of the method."""
    for flag, field in LORA_FLAGS.items():
        if settings.gives(flag) and field not in fields:
            raise ValueError(
                f"`{flag}` is an option of LoRA and has no effect on {kind.about.name}; leave it "
                f"out. Its own options are {_listed(fields)}."
            )
    lora = settings.model
    if lora.lora_r < 1:
        raise ValueError(f"`lora_r` is {lora.lora_r}; it must be at least 1.")
    run = settings.run
    rank_is_open = run.budget is not None or run.paper or kind.equal_parameters
    values = {
        "rank": None if rank_is_open and not settings.gives("lora_r") else lora.lora_r,
        "scale": lora.lora_alpha / lora.lora_r,
        "dropout": lora.lora_dropout,
        "targets": lora.lora_target_modules,
        "parameters": lora.lora_target_parameters,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }
    if has_own_scale(kind) and not settings.gives("lora_alpha"):
        del values["scale"]
    return {field: value for field, value in values.items() if field in fields}


def has_own_scale(kind: type[Method]) -> bool:
    """Whether a method's authors scale its update otherwise than LoRA's."""
    scales = [field.default for field in dataclasses.fields(kind) if field.name == "scale"]
    return bool(scales) and scales[0] != LoraShaped.scale


def _own_values(settings: Settings, kind: type[Method], fields: set[str]) -> dict[str, Any]:
    """The options given as `method.NAME`."""
    own = dict(settings.method_options)
    types = get_type_hints(kind)
    for name, value in own.items():
        if name not in fields:
            near = get_close_matches(name, sorted(fields), n=1)
            hint = f"did you mean `{OPTIONS}.{near[0]}`?" if near else f"it has {_listed(fields)}."
            raise ValueError(f"{kind.about.name} has no option `{OPTIONS}.{name}`; {hint}")
        own[name] = _of_type(types[name], name, value)
    return own


def _of_type(expected: Any, name: str, value: Any) -> Any:
    """The value, a whole number as a fraction where one is wanted."""
    kinds = get_args(expected) or (expected,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    try:
        type_validator(name, value, expected)
    except TypeError as error:
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"`{OPTIONS}.{name}` is {value!r}; it must be {wanted}.") from error
    return value


def _refuse_allocation(settings: Settings) -> None:
    given = [name for name in settings.given if name.startswith(f"{BLOCK}.")]
    if given:
        raise ValueError(
            f"`{given[0]}` is an option of rank allocation, and {settings.run.method} has none; "
            "leave it out, or use `--method alora`."
        )


def _budget_sentence(settings: Settings, kind: type[Method]) -> str:
    budget = settings.run.budget
    if budget is not None and budget < 1:
        return f"`budget` is {budget}; it must be a number of parameters of at least 1."
    if not kind.size:
        return f"{kind.about.name} has one size only, which `budget` cannot choose; leave it out."
    return (
        f"`budget` chooses the {kind.size} of {kind.about.name}, which was given too; leave out "
        "one of the two."
    )


def _listed(fields: set[str]) -> str:
    return ", ".join(f"`{OPTIONS}.{name}`" for name in sorted(fields))
