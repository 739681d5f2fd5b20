"""What an option may be: one of ours by its name, or a user's own by its place or itself."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""What "package.module:name" looks like."""


def check(option: str, value: object, ours: Mapping[str, str]) -> None:
    """Refuse what can be neither one of ours nor a user's; nothing is imported.

    Args:
        option: Its name, for the message.
        value: The name of one of ours, "package.module:name", or something to call.
        ours: The place of each of ours by its name.

    Raises:
        ValueError: It is none of the three.
    """
    if callable(value) or (
        isinstance(value, str) and (value in ours or PLACE.fullmatch(value) is not None)
    ):
        return
    near = get_close_matches(str(value), ours, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    choices = ", ".join(map(repr, ours))
    raise ValueError(
        f"`{option}` is {value!r}; use one of {choices} or your own, as 'package.module:name' or "
        f"as the function itself.{hint}"
    )


def load(option: str, value: Any, ours: Mapping[str, str]) -> Any:
    """The function or class that an option names.

    Args:
        option: Its name, for the message.
        value: As `check` takes it.
        ours: The place of each of ours by its name.

    Raises:
        ValueError: It cannot be imported, or cannot be called.
    """
    if not isinstance(value, str):
        return value
    module_name, _, path = ours.get(value, value).partition(":")
    try:
        with _found_from_here():
            module = import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(
            f"`{option}` is {value!r}, but {module_name} cannot be imported "
            f"({type(error).__name__}: {error}); name a module that Python finds from where the "
            "run is started."
        ) from error
    try:
        found = functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        near = get_close_matches(path, vars(module), n=1)
        hint = f" Did you mean {f'{module_name}:{near[0]}'!r}?" if near else ""
        raise ValueError(
            f"`{option}` is {value!r}, but {module_name} has no {path!r}.{hint}"
        ) from None
    if not callable(found):
        raise ValueError(
            f"`{option}` is {value!r}, which is a {type(found).__name__} and cannot be called; "
            "name a function or a class."
        )
    return found


@contextmanager
def _found_from_here() -> Iterator[None]:
    """Modules of the working directory are found inside, after all others.

    An installed command does not look there, and should not for anything that nobody named.
    """
    here = os.getcwd()
    is_new = here not in sys.path and "" not in sys.path
    if is_new:
        sys.path.append(here)
    try:
        yield
    finally:
        if is_new:
            sys.path.remove(here)


def check_takes(
    option: str,
    value: Any,
    wanted: str,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a function that cannot be called as it will be.

    Args:
        option: The option's name, for the message.
        value: The function or class.
        wanted: Its signature as it should be, for the message.
        arguments: As many as it will be called with; only their number is looked at.
        keywords: As those that it will be called with; only their names are looked at.

    Raises:
        ValueError: It does not take them.
    """
    try:
        signature = inspect.signature(value)
    except ValueError:  # some that are written in C tell none
        return
    try:
        signature.bind(*arguments, **(keywords or {}))
    except TypeError as error:
        raise ValueError(
            f"`{option}` is {name_of(value)!r}, which takes {signature} ({error}); it is called "
            f"as {wanted}."
        ) from None


def name_of(value: Any) -> str:
    """A name that can be written down: that of ours, or "package.module:name"."""
    if isinstance(value, str):
        return value
    value = bare(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def bare(value: Any) -> Any:
    """What is called under `functools.partial`."""
    while isinstance(value, functools.partial):
        value = value.func
    return value
