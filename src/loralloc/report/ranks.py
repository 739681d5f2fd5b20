"""The ranks of a run as a coloured table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from loralloc.report.grid import RankChange, RankGrid, read_allocation, total

__all__ = ["RankChange", "RankGrid", "rank_table", "read_allocation", "summary"]

# The weakest and the strongest tile of a hue. All carry white text and stand out from a dark and
# from a light background alike: strength is told by saturation, not by brightness.
LOST = ((142, 104, 78), (200, 60, 0))
GAINED = ((82, 108, 142), (0, 84, 212))
DIM = "dim"
CORNER = "layer"


def rank_table(grid: RankGrid, width: int) -> RenderableType:
    """Ranks by module and layer, with what changed from the start.

    Layers are columns, as in Figure 3 of Liu et al. 2024, where that fits into `width` characters;
    otherwise they are rows. The change follows the rank with its amount where there is room
    ("6 -2", "11 +3") and as a sign where there is not ("6-", "11+"), so that nothing is told by
    colour alone. What fits neither way is cut into several tables.
    """
    scale = _Scale.of(grid.modules)
    parts: list[RenderableType] = [Text(_title(grid), style="bold"), ""]
    if grid.cells:
        layouts = [
            _Layout.of(grid, layers_across=across, amounts=amounts)
            for across in (True, False)
            for amounts in (True, False)
        ]
        # the first that fits into one table, or else the one with the fewest tables
        for table in min((layout.tables(width, scale) for layout in layouts), key=len):
            parts += [table, ""]
    if grid.others:
        column = _Column("", tuple(grid.others.values()), amounts=True)
        name_width = max(map(len, grid.others))
        for i, name in enumerate(grid.others):
            name_part = Text(f"{name:>{name_width}} ", style=DIM)
            parts.append(Text.assemble(name_part, column.tile(i, scale)))
        parts.append("")
    return Group(*parts, Text(summary(grid)))


def summary(grid: RankGrid) -> str:
    """One line: the budget at the start and now, and how many modules gained, lost, emptied."""
    changes = [cell.change for cell in grid.modules]
    emptied = sum(cell.now == 0 < cell.start for cell in grid.modules)
    new = f" and {grid.num_new:,} that no round has scored yet" if grid.num_new else ""
    return (
        f"{grid.total.start:,} ranks at the start, {grid.total.now:,} now{new}; modules: "
        f"{sum(c > 0 for c in changes)} gained, {sum(c < 0 for c in changes)} lost "
        f"({emptied} emptied)"
    )


def _title(grid: RankGrid) -> str:
    when = "at the start"
    if grid.shown_round:
        when = f"after round {grid.shown_round} of {grid.num_rounds}"
    start = grid.common_start
    begun = "" if start is None else f" (every module started with {start})"
    without = f", without the {grid.num_new:,} that it gave" if grid.num_new else ""
    return f"Ranks {when}{begun}{without}"


@dataclass(frozen=True)
class _Scale:
    """How far the changes reach, for the strength of their colours."""

    most_lost: int
    most_gained: int

    @classmethod
    def of(cls, cells: Iterable[RankChange]) -> _Scale:
        changes = [0, *(cell.change for cell in cells)]
        return cls(most_lost=-min(changes), most_gained=max(changes))

    def style(self, cell: RankChange) -> Style:
        """The tile of a cell; unchanged ranks stay plain."""
        if cell.change == 0:
            return Style.null()
        (weak, strong), most = (
            (LOST, self.most_lost) if cell.change < 0 else (GAINED, self.most_gained)
        )
        share = (abs(cell.change) - 1) / max(most - 1, 1)
        rgb = [round(a + share * (b - a)) for a, b in zip(weak, strong, strict=True)]
        return Style(color="#ffffff", bgcolor="rgb({},{},{})".format(*rgb))


@dataclass(frozen=True)
class _Column:
    """The cells under one heading, with their total at the foot."""

    heading: str
    cells: tuple[RankChange | None, ...]
    amounts: bool
    """Whether a change is written with its amount ("6 -2") or as a sign ("6-")."""

    coloured: bool = True

    @cached_property
    def words(self) -> list[str]:
        """Every cell as text of one width, ranks and changes aligned with each other."""
        pairs = [self._pair(cell) for cell in self.cells]
        rank_width, change_width = (max(map(len, side)) for side in zip(*pairs, strict=True))
        return [f"{rank:>{rank_width}}{change:<{change_width}}" for rank, change in pairs]

    @cached_property
    def foot(self) -> str:
        """The total as text."""
        return "".join(self._pair(total(self.cells)))

    @cached_property
    def width(self) -> int:
        margin = 2 if self.amounts and self.coloured else 0
        return max(*map(len, self.heading.split("\n")), len(self.words[0]) + margin, len(self.foot))

    def tile(self, row: int, scale: _Scale) -> Text:
        """One cell, coloured over the column's whole width."""
        cell = self.cells[row]
        words = self.words[row].center(self.width)
        if cell is None:
            return Text(words, style=DIM)
        return Text(words, style=scale.style(cell) if self.coloured else "")

    def _pair(self, cell: RankChange | None) -> tuple[str, str]:
        if cell is None:
            return ".", ""
        if cell.change == 0:
            return str(cell.now), ""
        if self.amounts:
            return str(cell.now), f" {cell.change:+d}"
        return str(cell.now), "+" if cell.change > 0 else "-"


@dataclass(frozen=True)
class _Layout:
    """A table whose width is known before it is drawn."""

    rows: tuple[str, ...]
    columns: tuple[_Column, ...]

    @classmethod
    def of(cls, grid: RankGrid, *, layers_across: bool, amounts: bool) -> _Layout:
        """The whole grid, with a column of totals."""
        layers = tuple(str(layer) for layer in grid.layers)
        by_layer = [
            tuple(grid.cells.get((layer, kind)) for kind in grid.kinds) for layer in grid.layers
        ]
        if layers_across:
            rows, headings, columns = grid.kinds, layers, by_layer
        else:
            rows, headings = layers, tuple(re.sub("[. ]", "\n", kind) for kind in grid.kinds)
            columns = list(zip(*by_layer, strict=True))
        row_totals = tuple(total(cells) for cells in zip(*columns, strict=True))
        parts = zip(headings, columns, strict=True)
        return cls(
            rows,
            (
                *(_Column(heading, cells, amounts) for heading, cells in parts),
                _Column("total", row_totals, amounts=True, coloured=False),
            ),
        )

    def tables(self, width: int, scale: _Scale) -> list[Table]:
        """As few tables, one under the other, as `width` allows."""
        room = width - max(map(len, (CORNER, *self.rows)))
        blocks: list[list[_Column]] = [[]]
        for column in self.columns:
            if blocks[-1] and sum(c.width + 1 for c in [*blocks[-1], column]) > room:
                blocks.append([])
            blocks[-1].append(column)
        return [self._table(block, scale) for block in blocks]

    def _table(self, columns: Sequence[_Column], scale: _Scale) -> Table:
        table = Table(
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            header_style=DIM,
            footer_style="bold",
            show_footer=True,
        )
        table.add_column(CORNER, "total", justify="right", vertical="bottom", style=DIM)
        for column in columns:
            table.add_column(
                Text(column.heading, justify="center"), Text(column.foot, justify="center")
            )
        for i, row in enumerate(self.rows):
            table.add_row(row, *(column.tile(i, scale) for column in columns))
        return table
