"""Attributes of somebody else's object that are replaced for a while, and given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def replace(owner: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set attributes of an instance.

    Returns:
        What `give_back` wants: those that the instance itself had before, by name.
    """
    before = {name: value for name, value in vars(owner).items() if name in values}
    vars(owner).update(values)
    return before


def give_back(owner: object, names: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Undo `replace`: attributes come from the class again, or are what they were."""
    for name in names:
        vars(owner).pop(name, None)
    vars(owner).update(before)


@contextmanager
def replaced(owner: object, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of an instance replaced inside."""
    before = replace(owner, values)
    try:
        yield
    finally:
        give_back(owner, values, before)
