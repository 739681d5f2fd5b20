"""Files of JSON as nobody should write them, made of bytes: any bytes make one, the same always.

A whole document is taken and changed at a few places: a value by one of another kind or size, a
name by another's, parts left out, doubled, exchanged; last of all perhaps a byte of the text.
"""

import json
import marshal
from collections.abc import Sequence
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**16, 2**16 + 1, 10**7, 2**31, 2**63, 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "a", "\x00", "\x1b[2J", "\ud800", "..", "/etc/passwd", "../../x", "q_proj", "(", "[a"),
    *(
        "(a+)+$",
        ".*",
        "(.*)*(.*)*x",
        "a" * 2000,
        "NaN",
        "-1",
        "1",
        "\u202e",
        "__class__",
        "os:system",
    ),
    *([], {}, [[]], [None], [0, 0], [-1], ["a"], {"a": 1}, {"": None}, [[1, 2], [3]], {"value": 1}),
)
"""Values that some reader may take for something else."""

MOST_CHANGES = 6


class Choices:
    """Whole numbers below a bound, from bytes; zeros where the bytes have ended."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, bound: int) -> int:
        if bound <= 1:
            return 0
        size = 1 if bound <= 256 else 2
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % bound


def made(data: bytes, whole: Sequence[Any]) -> bytes:
    """The content of a file, after one of the whole documents."""
    choose = Choices(data)
    document = _copied(whole[choose.below(len(whole))])
    others = [whole[choose.below(len(whole))]]
    for _ in range(choose.below(MOST_CHANGES + 1)):
        document = _changed(document, choose, others)
    text = json.dumps(document)
    if choose.below(8) == 1 and text:
        at = choose.below(len(text))
        text = text[:at] + chr(choose.below(256)) + text[at + choose.below(3) :]
    if choose.below(16) == 1:  # a name twice
        text = text.replace("{", '{"version": 1, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _place(value: Any, choose: Choices) -> tuple[Any, Any]:
    """A container in a document with one of its keys: as deep as it is chosen."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[choose.below(len(keys))]
        below = value[key]
        if not isinstance(below, (dict, list)) or not below or choose.below(4) == 1:
            return value, key
        value = below


def _changed(document: Any, choose: Choices, others: list[Any]) -> Any:
    if not isinstance(document, (dict, list)):
        return document
    if not document:
        return _strange(choose)
    holder, key = _place(document, choose)
    how = choose.below(8)
    if how <= 2:
        holder[key] = _strange(choose)
    elif how == 3:
        del holder[key]
    elif how == 4 and isinstance(holder, list):
        holder.insert(choose.below(len(holder) + 1), _copied(holder[key]))
    elif how == 4:
        holder[str(_strange(choose))[:50]] = _copied(holder[key])
    elif how == 5:
        other, its_key = _place(document, choose)
        holder[key] = _copied(other[its_key])
    elif how == 6 and isinstance(holder[key], int):
        holder[key] += choose.below(5) - 2
    elif how == 6:
        holder[key] = [holder[key]]
    else:
        holder[key] = _copied(others[0])
    return document


def _strange(choose: Choices) -> Any:
    return _copied(STRANGE[choose.below(len(STRANGE))])


def _copied(value: Any) -> Any:
    return marshal.loads(marshal.dumps(value))
