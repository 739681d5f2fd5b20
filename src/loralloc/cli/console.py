"""Where things are printed: what a stranger's file says is shown, and no terminal obeys it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import rich.console
from rich.console import ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves, colours or turns round what a terminal shows, and what it cannot show at all."""


GAP = 2
"""Characters between two columns of a table."""


def visible(text: str) -> str:
    """A text with what a terminal would obey written out, as Python's `ascii` does."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def counted(number: int, thing: str) -> str:
    """How many there are of what has its plural by an s: "1 round", "1,680 ranks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class Console(rich.console.Console):
    """Rich's console, whose own colours alone reach the terminal; brackets are no markup."""

    def __init__(self, **options: Any) -> None:
        """Take the options of Rich's."""
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The parts of what is shown, their texts as `visible` writes them."""
        for part in super().render(renderable, options):
            if part.control is None and _OBEYED.search(part.text):
                part = Segment(visible(part.text), part.style)
            yield part


def tables_that_fit(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int, texts: int = 1
) -> list[Table]:
    """As few tables, one under the other, as `width` allows without breaking a cell.

    Args:
        title: What stands above the first.
        columns: The headings, which may break between words.
        rows: The cells. The first of every row begins its line in every table.
        width: Of the terminal, in characters.
        texts: How many of the first columns are texts; numbers end where their column does.
    """
    widths = [
        max([*map(len, heading.split()), *(len(row[i]) for row in rows)])
        for i, heading in enumerate(columns)
    ]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        if len(parts[-1]) > 1 and sum(widths[j] + GAP for j in parts[-1]) + widths[i] > width:
            parts.append([0])
        parts[-1].append(i)
    tables: list[Table] = []
    for part in parts:
        table = Table(
            title=None if tables else title, title_justify="left", box=None, pad_edge=False
        )
        for i in part:
            justify: JustifyMethod = "left" if i < texts else "right"
            table.add_column(columns[i], justify=justify, width=widths[i], overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in part))
        tables.append(table)
    return tables
