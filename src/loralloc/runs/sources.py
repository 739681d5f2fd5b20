"""Where a run's options come from: flags, a YAML file, or a mapping in Python.

Each source gives its values flat, by the names that the classes of `arguments` have for them; those
of the allocation as `allocation.NAME`, a method's own as `method.NAME`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.named import name_of
from loralloc.runs.arguments import BLOCK, GROUPS, OPTIONS

ALLOCATION = tuple(f.name for f in fields(AllocationConfig))
"""Options of the allocation, by their bare names."""

NAME = "name"
"""What the block `method:` calls the method itself."""

CHECKED = (int, float, string_to_bool)
"""Readers of flags that refuse a number of another kind."""


def parser() -> HfArgumentParser:
    """What reads the flags of all but the allocation; an option that is not given stays out."""
    made = HfArgumentParser(GROUPS, allow_abbrev=False, exit_on_error=False, add_help=False)
    for action in made._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return made


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Options given as flags, `--name value` or `--name=value`.

    Those of the allocation are `--allocation.name`, or their bare name where TRL has no such field.

    Raises:
        ValueError: A flag is unknown, or its value cannot be used.
    """
    reader = parser()
    own = {action.dest for action in reader._actions}
    values: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(flags)
    while queue:
        flag = queue.pop(0)
        name, _, attached = flag.removeprefix("--").partition("=")
        if flag.startswith(f"--{OPTIONS}."):
            values[name.replace("-", "_")] = _scalar(_value_of(flag, attached, queue))
            continue
        bare = name.removeprefix(BLOCK + ".").replace("-", "_")
        dotted = name.startswith(BLOCK + ".")
        if not flag.startswith("--") or not (dotted or (bare in ALLOCATION and bare not in own)):
            rest.append(flag)
            continue
        if bare not in ALLOCATION:
            raise ValueError(_unknown(name, map(_dotted, ALLOCATION), "among the flags"))
        values[_dotted(bare)] = _scalar(_value_of(flag, attached, queue))
    try:
        namespace, unknown = reader.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(f"A flag could not be read: {error}.") from error
    if unknown and not unknown[0].startswith("-"):
        raise ValueError(
            f"{unknown[0]!r} stands among the flags and no flag takes it; a list of numbers is one "
            "value, as in --rounds_at='[20, 60]'. `loralloc train --help-all` lists all flags."
        )
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(_unknown(name, {*own, *map(_dotted, ALLOCATION)}, "among the flags"))
    return {**vars(namespace), **values}


def read_yaml(path: Path) -> dict[str, Any]:
    """Options in a TRL SFT YAML, which may have the blocks `allocation:` and `method:` as well.

    Its block `env:` goes into the environment.

    Raises:
        ValueError: There is no such file, an option is unknown, or a value cannot be used.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        what = f"{path} is a folder" if path.is_dir() else f"There is no file {path}"
        raise ValueError(f"{what}; `--config` takes a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; `--config` takes a YAML file.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {where}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold `option: value` lines, not a {type(data).__name__}.")
    for name, value in (data.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    return read_mapping(data, where=f"in {path}")


def read_mapping(options: Mapping[str, Any], *, where: str = "in the options") -> dict[str, Any]:
    """Options by the names of their flags, with values of Python's types or as text.

    Args:
        options: Those of the allocation as `allocation.name`, by their bare name where TRL has no
            such field, or in a mapping `allocation`; a method's own as `method.name`, or in a
            mapping `method`, whose `name` is the method.
        where: Where they stand, for messages.

    Raises:
        ValueError: An option is unknown, or its value cannot be used.
    """
    # The first of those that share a name: `--no_x` comes behind `--x`, and reads no value.
    types = {action.dest: action for action in reversed(parser()._actions)}
    values: dict[str, Any] = {}
    for given, value in options.items():
        name = str(given).replace("-", "_")
        if name == BLOCK or (name == OPTIONS and isinstance(value, Mapping)):
            values |= _read_block(name, value, where)
        elif name.startswith(OPTIONS + "."):
            values[name] = _scalar(value)
        elif name.removeprefix(BLOCK + ".") in ALLOCATION and name not in types:
            values[_dotted(name.removeprefix(BLOCK + "."))] = _scalar(value)
        elif name in types:
            values[name] = _as_its_flag(types[name], value, where)
        else:
            raise ValueError(_unknown(str(given), {*types, *map(_dotted, ALLOCATION)}, where))
    return values


def _read_block(block: str, options: Any, where: str) -> dict[str, Any]:
    """The options of the allocation, or of a method, in a mapping of their own."""
    if not isinstance(options, Mapping | None):
        raise ValueError(f"The block `{block}:` {where} must hold `option: value` lines.")
    values = {str(name): _scalar(value) for name, value in (options or {}).items()}
    unknown = [name for name in values if block == BLOCK and name not in ALLOCATION]
    if unknown:
        raise ValueError(_unknown(unknown[0], ALLOCATION, f"in the block `{BLOCK}:` {where}"))
    own = {block: values.pop(NAME)} if block == OPTIONS and NAME in values else {}
    return own | {f"{block}.{name}": value for name, value in values.items()}


def _as_its_flag(action: argparse.Action, value: Any, where: str) -> Any:
    """A value as the flag of its option would have read it; what is no text or number stays."""
    if action.nargs == "+" and value is not None:
        several = value if isinstance(value, list | tuple) else [value]
        return [_converted(action, one, where) for one in several]
    return _converted(action, value, where)


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, type):
        value = name_of(value)  # a method of the user's own, as its flag would name it
    convert = action.type
    if not callable(convert) or not (isinstance(value, str) or _is_checked(value, convert)):
        return value
    try:
        found = convert(value if isinstance(value, str) else str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"`{action.dest}` {where} cannot be {value!r}: {error}.") from error
    if action.choices is not None and found not in action.choices:
        names = ", ".join(map(repr, action.choices))
        raise ValueError(f"`{action.dest}` {where} cannot be {value!r}; choose from {names}.")
    return found


def _is_checked(value: Any, convert: Callable[..., Any]) -> bool:
    return isinstance(value, int | float) and convert in CHECKED


def _value_of(flag: str, attached: str, queue: list[str]) -> str:
    """What was given with a flag, `--flag=value` or `--flag value`."""
    if not attached and (not queue or queue[0].startswith("--")):
        raise ValueError(f"The flag {flag} needs a value.")
    return attached or queue.pop(0)


def _scalar(value: Any) -> Any:
    """A YAML scalar, with 1e-4 read as a number too."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() else yaml.safe_load(value)
    except ValueError:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _dotted(name: str) -> str:
    return f"{BLOCK}.{name}"


def _unknown(name: str, known: Iterable[str], where: str) -> str:
    near = get_close_matches(name.replace("-", "_"), sorted(known), n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "`loralloc train --help-all` lists all."
    )
    return f"Unknown option {name!r} {where}; {hint}"
