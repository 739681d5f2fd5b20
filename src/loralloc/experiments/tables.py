"""A table of words, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SPECIAL = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
"""What LaTeX reads as something else."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text below headings; the first column is of words, the others of figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Sentences below it."""

    def __post_init__(self) -> None:
        """Check that it is one."""
        widths = {len(row) for row in self.rows} - {len(self.columns)}
        assert not widths, f"rows of {widths} cells below {len(self.columns)} headings"

    def as_data(self) -> dict[str, Any]:
        """The table as JSON has it."""
        return asdict(self)

    def markdown(self) -> str:
        """The table as GitHub's Markdown."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [_bar(self.columns), _bar(rule), *(_bar(row) for row in self.rows)]
        notes = [line for note in self.notes for line in ("", note)]
        return "\n".join([f"## {self.title}", "", *lines, *notes, ""])

    def latex(self) -> str:
        """The table as a `tabular` with the rules of booktabs."""
        form = "l" + "r" * (len(self.columns) - 1)
        body = [_row(row) for row in self.rows]
        notes = [f"% {note}" for note in self.notes]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{latex_text(self.title)}}}",
                rf"\begin{{tabular}}{{{form}}}",
                r"\toprule",
                _row(self.columns),
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                *notes,
                "",
            ]
        )


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(latex_text(cell) for cell in cells) + r" \\"


def latex_text(text: str) -> str:
    """Words as LaTeX prints them."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)
