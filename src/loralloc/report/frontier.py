"""The sizes that a shrinking adapter passed, as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loralloc.allocation.record import Record
from loralloc.allocation.shrinking import in_words


def frontier_table(record: Record) -> RenderableType:
    """Parameters against held-out loss, at every size in order, and what that comes to.

    Args:
        record: Of a run that shrank.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("step", "parameters", "ranks", "modules", "held-out loss", "worse by"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for size in record.frontier:
        table.add_row(
            f"{size.step:,}",
            f"{size.parameters:,}",
            f"{size.ranks:,}",
            str(size.modules),
            f"{size.loss:.4f}",
            f"{size.worse_by:+.4f} ± {size.standard_error:.4f}" if size.standard_error else "-",
            "" if size.kept else "not taken",
        )
    return Group(table, "", Text(in_words(record)))
