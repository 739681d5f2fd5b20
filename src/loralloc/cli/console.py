"""Where things are printed: what a stranger's file says is shown, and no terminal obeys it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves, colours or turns round what a terminal shows, and what it cannot show at all."""


def visible(text: str) -> str:
    """A text with what a terminal would obey written out, as Python's `ascii` does."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


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
