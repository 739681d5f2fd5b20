"""A report on runs: one HTML page that needs nothing else, and its figures and tables as files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from loralloc import __version__
from loralloc.report import tables
from loralloc.report.budgets import frontiers, sweeps
from loralloc.report.drawing import DARK, LIGHT, Drawing
from loralloc.report.flows import flow_drawings, score_drawings
from loralloc.report.folders import TrainedRun
from loralloc.report.heat import heat_map
from loralloc.report.lines import learning_curves, round_lines
from loralloc.report.picture import rank_figure
from loralloc.report.series import series_of
from loralloc.report.tables import Table

FORMATS = ("html", "png", "svg", "markdown", "latex")
PAGE = "report.html"
SUFFIXES = {"markdown": ".md", "latex": ".tex"}
PARTS = "page"
"""Folder of the template, the style sheet and the script."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of the page."""

    anchor: str
    title: str
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is reported of some runs."""

    runs: Sequence[TrainedRun]
    parts: Sequence[Part]
    """Sections on all runs; "ranks" stands for those on each run."""

    by_run: Sequence[tuple[TrainedRun, Sequence[Drawing]]]
    """The runs that moved ranks, each with its own figures."""

    @property
    def drawings(self) -> list[Drawing]:
        """Every figure."""
        own = [drawing for _, drawings in self.by_run for drawing in drawings]
        return [*(drawing for part in self.parts for drawing in part.drawings), *own]

    @property
    def tables(self) -> list[Table]:
        """Every table."""
        return [table for part in self.parts for table in part.tables]


def report_on(runs: Sequence[TrainedRun], *, experiments: Sequence[Table] = ()) -> Report:
    """Find out what can be said of some runs; a section without anything in it is left out.

    Args:
        runs: The runs.
        experiments: Tables of the experiments that they belong to, which come first.
    """
    series = series_of(runs)
    parts = [
        Part(anchor="experiments", title="Experiments", tables=experiments),
        Part(
            anchor="results",
            title="Results",
            tables=_there(tables.by_series(series), tables.results(runs)),
        ),
        Part(anchor="budgets", title="Budgets", drawings=sweeps(series)),
        Part(anchor="learning", title="Learning curves", drawings=learning_curves(series)),
        Part(
            anchor="frontier",
            title="How small it can be",
            drawings=frontiers(series),
            tables=_there(tables.frontier(runs)),
        ),
        Part(anchor="ranks", title="Where the ranks went"),
        Part(
            anchor="rounds",
            title="Rounds",
            drawings=round_lines(series),
            tables=_there(tables.rounds(runs)),
        ),
    ]
    moved = [run for run in runs if run.moves and run.moves.rounds]
    own = [
        (run, [*flow_drawings(run, name=name), *score_drawings(run, name=name)])
        for run, name in ((run, f"run-{runs.index(run) + 1}") for run in moved)
    ]
    kept = [p for p in parts if p.drawings or p.tables or (p.anchor == "ranks" and own)]
    return Report(runs=runs, parts=kept, by_run=own)


def write(report: Report, folder: Path, *, formats: Collection[str]) -> list[Path]:
    """Write a report into a folder, in the place of an earlier one.

    Args:
        report: What to write.
        folder: Where to; it is made where it is not there.
        formats: Some of `FORMATS`: the page, every figure as PNG or SVG, every table.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if "html" in formats:
        (folder / PAGE).write_text(page(report), encoding="utf-8")
        written.append(folder / PAGE)
    for kind in ("png", "svg"):
        if kind in formats:
            written += _figures(report, folder, f".{kind}")
    for kind, suffix in SUFFIXES.items():
        if kind in formats:
            for table in report.tables:
                path = folder / f"{table.name}{suffix}"
                text = table.markdown() if kind == "markdown" else table.latex()
                path.write_text(text, encoding="utf-8")
                written.append(path)
    return written


def page(report: Report) -> str:
    """The HTML page: all that it needs is in it, and its own policy forbids everything else."""
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    maps = [heat_map(run) for run, _ in report.by_run]
    return environment.from_string(_part("page.html.j2")).render(
        report=report,
        maps=maps,
        data=[found.data for found in maps],
        light=LIGHT,
        dark=DARK,
        style=Markup(_part("page.css")),
        script=Markup(script),
        digest=digest,
        version=__version__,
        inline=lambda drawing: Markup(drawing.inline()),
    )


def _figures(report: Report, folder: Path, suffix: str) -> list[Path]:
    written = []
    for drawing in report.drawings:
        written.append(folder / f"{drawing.name}{suffix}")
        drawing.save(written[-1])
    for run, _ in report.by_run:
        grid = run.grid(scored=True)
        if grid.cells:
            written.append(folder / f"run-{report.runs.index(run) + 1}-ranks{suffix}")
            rank_figure(grid, written[-1])
    return written


def _there(*found: Table | None) -> list[Table]:
    return [table for table in found if table is not None]


def _part(name: str) -> str:
    return (files("loralloc.report") / PARTS / name).read_text(encoding="utf-8")
