"""What a record of rounds may hold: a stranger's is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loralloc.allocation.files import is_number

MOST_RANK = 2**16
"""Ranks of one module: more than the width of any layer that there is."""

MOST_RANKS = 2**22
"""Ranks of all modules together: 10,000 modules of 256 have fewer."""


def checked_ranks(value: Any, where: str) -> dict[str, int]:
    """Ranks by module, of a size that some model has.

    Raises:
        ValueError: They are something else; the sentence begins with `where`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__} and no object")
    for name, rank in value.items():
        if not name.isprintable():  # a terminal would do what it says
            raise ValueError(f"{where} has a module {name!r}, which is no name")
        if not _is_count(rank) or rank > MOST_RANK:
            raise ValueError(
                f"{where} gives {name} the rank {_shown(rank)}, which is no whole number from 0 to "
                f"{MOST_RANK:,}"
            )
    if sum(value.values()) > MOST_RANKS:
        raise ValueError(f"{where} has {sum(value.values()):,} ranks, and at most {MOST_RANKS:,}")
    return value


def check_record(data: Mapping[str, Any]) -> None:
    """Refuse what no run writes: other kinds of values, or rounds that do not follow one another.

    Args:
        data: The content of `allocation.json`.

    Raises:
        ValueError: Naming what it is.
    """
    ranks = dict(checked_ranks(data["initial_ranks"], "`initial_ranks`"))
    for name, fits in _RECORD.items():
        if name in data and not fits(data[name]):
            raise ValueError(f"`{name}` is {_shown(data[name])}, which is none")
    for number, entry in enumerate(data["rounds"], start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"round {number} is a {type(entry).__name__} and no object")
        if entry.get("round") != number:
            raise ValueError(f"round {number} is numbered {_shown(entry.get('round'))}")
        for name, fits in _ROUND.items():
            if name in entry and not fits(entry[name]):
                raise ValueError(f"`{name}` of round {number} is {_shown(entry[name])}")
        _follow(ranks, entry, number)
    for size in data.get("frontier", ()):
        for name, value in size.items():
            if not (is_number(value) or isinstance(value, bool)):
                raise ValueError(f"`{name}` of a size is {_shown(value)}, which is no number")


def _follow(ranks: dict[str, int], entry: Mapping[str, Any], number: int) -> None:
    """Let a round change the ranks, which are to become what it says they became."""
    where = f"round {number}"
    before = checked_ranks(entry["ranks_before"], f"`ranks_before` of {where}")
    after = checked_ranks(entry["ranks_after"], f"`ranks_after` of {where}")
    if before != ranks:
        raise ValueError(f"{where} begins with other ranks than the one before ended with")
    for name, indices in entry["pruned"].items():
        if len(set(indices)) < len(indices) or any(i >= ranks[name] for i in indices):
            raise ValueError(f"{where} prunes ranks of {name} that there are not")
        ranks[name] -= len(indices)
    for name, count in entry["added"].items():
        ranks[name] += count
    if ranks != after:
        raise ValueError(f"what {where} pruned and added is not what became of the ranks")


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all_are(fits: Callable[[Any], bool], kind: type) -> Callable[[Any], bool]:
    def fit(value: Any) -> bool:
        if not isinstance(value, kind):
            return False
        items: Any = value
        return all(map(fits, items.values() if kind is dict else items))

    return fit


_INDICES = _all_are(_is_count, list)
_NUMBERS = _all_are(is_number, list)

_RECORD: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "round_steps": lambda value: value is None or _INDICES(value),
    "note": _is_text,
    "rounds": lambda value: isinstance(value, list),
    "frontier": _all_are(lambda size: isinstance(size, dict), list),
}
"""What the parts of a record are."""

_ROUND: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "epoch": is_number,
    "score": _is_text,
    "s_full": _is_number_or_none,
    "s_base": _is_number_or_none,
    "terms": _all_are(_all_are(_NUMBERS, dict), dict),
    "verified": _all_are(_INDICES, dict),
    "settled": lambda value: isinstance(value, bool),
    "pruned": _all_are(_INDICES, dict),
    "added": _all_are(_is_count, dict),
    "churn": _is_number_or_none,
    "lost": is_number,
    "spare": is_number,
    "seconds": is_number,
    "worth": _all_are(_NUMBERS, dict),
}
"""What the parts of a round are."""
