"""Every flag of `loralloc train`, with the default that a run has and what it is for."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from loralloc.allocation.config import AllocationConfig
from loralloc.methods.catalog import METHODS, get_method
from loralloc.runs.arguments import BLOCK, DEFAULTS, GROUPS, HELP, OPTIONS
from loralloc.runs.options import NEWER, READ_BY, UNCHANGED
from loralloc.runs.settings import DEFAULT, Settings

LEARNT_BY = (
    *("learning_rate", "warmup_steps", "per_device_train_batch_size", "train_sampling_strategy"),
    *("lora_r", "lora_alpha", "lora_dropout"),
)
"""Options that change what a run learns, and whose defaults here are not TRL's."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag."""

    name: str
    """As it is given, without its dashes."""

    default: Any
    """What a run has where nobody gives it; None where that follows from other things."""

    help: str
    """What it is for."""


def flags() -> dict[str, list[Flag]]:
    """The flags that a run reads, by the class or the method that they belong to."""
    groups = {
        group.__name__: [
            Flag(name=f.name, default=default_of(f.name), help=_help(f))
            for f in dataclasses.fields(group)
            if f.init and not READ_BY.get(f.name, NEWER).never
        ]
        for group in GROUPS
    }
    words = field_docstrings(AllocationConfig)
    groups[AllocationConfig.__name__] = [
        Flag(name=f"{BLOCK}.{f.name}", default=f.default, help=words[f.name])
        for f in dataclasses.fields(AllocationConfig)
    ]
    for name in METHODS:
        method = get_method(name)
        words = field_docstrings(method)
        groups[f"method {name}"] = [
            Flag(name=f"{OPTIONS}.{option}", default=value, help=words.get(option, ""))
            for option, value in method().options().items()
        ]
    return groups


def unread() -> dict[str, str]:
    """The fields of TRL's classes that no run reads, and why."""
    return {name: reading.never for name, reading in READ_BY.items() if reading.never}


def left_to_us(settings: Settings) -> str:
    """A sentence on what a YAML leaves out and TRL would do otherwise; empty without a YAML."""
    files = {source for source in settings.sources.values() if source.startswith("file ")}
    names = [name for name in LEARNT_BY if settings.sources[name] == DEFAULT]
    if not files or not names:
        return ""
    words = ", ".join(f"{name} {settings.given[name]} ({UNCHANGED[name]})" for name in names)
    return f"{files.pop().removeprefix('file ')} leaves out, and TRL's own is in brackets: {words}"


def default_of(name: str) -> Any:
    """What a run has for an option of TRL's or ours that nobody gives."""
    return DEFAULTS.get(name, UNCHANGED[name])


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field of a class and of those that it comes from, in one line."""
    found: dict[str, str] = {}
    for each in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found |= _own_docstrings(each)
    return found


@functools.cache  # reading a class parses its whole file, and methods share theirs
def _own_docstrings(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for before, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(before.target, ast.Name) and isinstance(after.value, ast.Constant)
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def _help(field: dataclasses.Field[Any]) -> str:
    words = HELP.get(field.name, field.metadata.get("help", ""))
    return " ".join(words.replace("%%", "%").split())
