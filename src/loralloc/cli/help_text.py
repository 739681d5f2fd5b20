"""How the help of a verb is laid out: in the terminal's width, its lists kept as lists."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator

_ENTRY = re.compile(r"( +\S.*?)( {2,})(\S.*)")
"""A line of a list: indented, a name, a gap, words."""


class HelpText(argparse.HelpFormatter):
    """Fills paragraphs, and the words of lists beside their names; breaks no word.

    An indented line without a gap is an example, which stays as it is.
    """

    def __init__(self, prog: str, max_help_position: int = 26, **options: int) -> None:
        """Begin the words of flags a little further to the right than argparse does."""
        super().__init__(prog, max_help_position=max_help_position, **options)

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for verbs, which argparse indents once more than it has counted."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line for part in _parts(text) for line in _filled(part, width))


def _parts(text: str) -> Iterator[list[str]]:
    """Lines that belong together: a paragraph, an entry of a list, an example, an empty line."""
    part: list[str] = []
    for line in text.strip("\n").splitlines():
        if part and not _goes_on(part[0], line):
            yield part
            part = []
        part.append(line)
    yield part


def _goes_on(first: str, line: str) -> bool:
    """Whether a line belongs to what begins with the first."""
    if not first.strip() or not line.strip():
        return False
    if entry := _ENTRY.fullmatch(first):
        return line.startswith(" " * entry.start(3))
    return not first.startswith(" ") and not line.startswith(" ")


def _filled(part: list[str], width: int) -> list[str]:
    first, *rest = part
    entry = _ENTRY.fullmatch(first)
    if first.startswith(" ") and not entry:
        return part
    head, words = (entry[1] + entry[2], entry[3]) if entry else ("", first)
    told = " ".join([words, *map(str.strip, rest)])
    return textwrap.wrap(
        told,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]
