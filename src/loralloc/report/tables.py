"""Tables of a report, and their forms: a page's template, Markdown, LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loralloc.report.budgets import measures, value_of
from loralloc.report.drawing import short_number
from loralloc.report.folders import TrainedRun
from loralloc.report.series import Series, data_of, method_of, model_of, size_of, spread


@dataclass(frozen=True, kw_only=True)
class Table:
    """Words in rows and columns."""

    name: str
    """What its file is called, without a suffix."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_texts: int = 1
    """Columns, from the first, that hold words; the others hold numbers."""

    notes: Sequence[str] = ()
    """Sentences below it."""

    def with_notes(self, notes: Sequence[str]) -> Table:
        """The same table with more sentences below it."""
        return replace(self, notes=[*self.notes, *notes])

    def markdown(self) -> str:
        """As GitHub and Pandoc read it."""
        rule = ["---" if i < self.num_texts else "---:" for i in range(len(self.headings))]
        lines = [_in_markdown(self.headings), rule, *map(_in_markdown, self.rows)]
        notes = [f"\n{_in_markdown([note])[0]}" for note in self.notes]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes]) + "\n"

    def latex(self) -> str:
        """As a tabular of the package booktabs."""
        form = "".join("l" if i < self.num_texts else "r" for i in range(len(self.headings)))
        rows = [" & ".join(map(_in_latex, row)) + r" \\" for row in (self.headings, *self.rows)]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{form}}}",
                *(r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"),
                r"\end{tabular}",
                *(f"% {note}" for note in self.notes),
                "",
            ]
        )


def results(runs: Sequence[TrainedRun]) -> Table:
    """A row for every run: what it was given and what it came to. Empty columns are left out."""
    columns: list[tuple[str, Callable[[TrainedRun], str]]] = [
        ("run", lambda run: run.name),
        ("method", method_of),
        ("model", model_of),
        ("data", data_of),
        ("seed", lambda run: str(run.settings.get("seed", ""))),
        ("size", size_of),
        ("parameters", lambda run: f"{run.parameters:,}" if run.parameters else ""),
        ("steps", lambda run: f"{max((e['step'] for e in run.log), default=0):,.0f}"),
        *((name, _measured(name)) for name in measures(runs)),
        ("rounds", lambda run: str(len(run.moves.rounds)) if run.moves else ""),
        ("rounds, s", lambda run: _of_rounds(run)),
        ("training (last part), s", lambda run: _seconds(_runtime(run))),
    ]
    told = [(heading, [form(run) for run in runs]) for heading, form in columns]
    kept = [(heading, cells) for heading, cells in told if any(cells)]
    return Table(
        name="results",
        title="Runs",
        headings=[heading for heading, _ in kept],
        rows=list(zip(*(cells for _, cells in kept), strict=True)),
        num_texts=sum(heading in ("run", "method", "model", "data") for heading, _ in kept),
    )


def by_series(series: Sequence[Series]) -> Table | None:
    """A row for every setting with the mean over its seeds; None where every run has its own."""
    if all(len(one.runs) == 1 for one in series):
        return None
    names = measures([run for one in series for run in one.runs])
    rows = []
    for one in series:
        sizes = sorted({run.parameters for run in one.runs if run.parameters})
        cells = [
            one.label,
            str(len(one.runs)),
            " to ".join(map(short_number, sizes[:: len(sizes) - 1 or 1])),
        ]
        for name in names:
            values = [v for run in one.runs if (v := value_of(run, name)) is not None]
            cells.append(spread(values, _form(name)) if values else "")
        rows.append(cells)
    return Table(
        name="seeds",
        title="Mean and standard deviation over seeds",
        headings=["runs that differ in their seed", "seeds", "parameters", *names],
        rows=rows,
    )


def rounds(runs: Sequence[TrainedRun]) -> Table | None:
    """A row for every round of every run; None where there were none."""
    rows = [
        [
            run.name,
            str(entry.round),
            f"{entry.step:,}",
            f"{entry.pruned:,}",
            f"{entry.given:,}",
            "" if entry.churn is None else f"{entry.churn:.0%}",
            "" if entry.loss is None else f"{entry.loss:.4f}",
            _seconds(entry.seconds),
        ]
        for run in runs
        if run.moves
        for entry in run.moves.rounds
    ]
    headings = ["run", "round", "step", "pruned", "given", "churn", "held-out loss", "seconds"]
    return Table(name="rounds", title="Rounds", headings=headings, rows=rows) if rows else None


def frontier(runs: Sequence[TrainedRun]) -> Table | None:
    """A row for every size that an adapter passed while it shrank; None where none did."""
    rows = [
        [run.name, f"{size.parameters:,}", f"{size.loss:.4f}", "yes" if size.kept else "no"]
        for run in runs
        for size in run.frontier
    ]
    headings = ["run", "parameters", "held-out loss", "kept"]
    return Table(name="frontier", title="Sizes", headings=headings, rows=rows) if rows else None


def _measured(name: str) -> Callable[[TrainedRun], str]:
    def form(run: TrainedRun) -> str:
        value = value_of(run, name)
        return "" if value is None else format(value, _form(name))

    return form


def _form(measure: str) -> str:
    return ".4f" if measure.endswith("loss") else ".2f"


def _of_rounds(run: TrainedRun) -> str:
    """Seconds of all rounds, with their share of training."""
    if not run.moves or not run.moves.rounds:
        return ""
    took = sum(entry.seconds or 0.0 for entry in run.moves.rounds)
    whole = _runtime(run)
    # A resumed run has logged how long its last part took: no whole that its rounds are a part of.
    return f"{took:.3g} ({took / whole:.0%})" if whole and took < whole else f"{took:.3g}"


def _runtime(run: TrainedRun) -> float | None:
    return next((e["train_runtime"] for e in reversed(run.log) if "train_runtime" in e), None)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _in_markdown(cells: Sequence[str]) -> list[str]:
    return [re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", cell) for cell in cells]


LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "…": r"\ldots{}"},
}


def _in_latex(cell: str) -> str:
    return "".join(LATEX.get(c, c) for c in cell)
