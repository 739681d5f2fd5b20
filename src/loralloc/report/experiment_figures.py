"""Figures of an experiment: scores by budget, final ranks (Figures 2 to 4 of Liu et al. 2024)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.experiments.collected import CROSS_ENTROPY, Entry, Section
from loralloc.experiments.experiment import Experiment
from loralloc.experiments.rank_grid import MeanRanks, layer_name, mean_ranks
from loralloc.experiments.reproduce import Report
from loralloc.experiments.views import TERMS
from loralloc.report.drawing import LIGHT, SIZE, Drawing, figures, legend, look
from loralloc.report.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
PANEL = (2.55, 2.45)
"""Inches of one task among several."""

APART = 0.09
"""Doublings of the budget between the points of two methods, so that none hides another."""

ROW, COLUMN = 0.21, 0.37
"""Inches of a cell of a heat map."""

LOWEST = 1.3
"""Inches of a heat map of few layers."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A method on a task."""

    method: str
    points: Mapping[int, Sequence[float]]
    """Budget as LoRA's rank -> a value for every seed that is there."""

    means: Mapping[int, float]
    """Budget -> the mean; without budgets at which a seed is missing."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A task, with a curve for every method."""

    title: str
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True)
class HeatPanel:
    """A method on a task, with the rank of every module."""

    title: str
    ranks: MeanRanks
    budget: int
    """The LoRA rank whose parameters are its budget."""


def figures_of(report: Report) -> list[Drawing]:
    """Every figure of an experiment; none of one that the paper has as a table."""
    experiment = report.grid.experiment
    if experiment.kind == "sweep":
        return [d for section in report.sections for d in _budgets(experiment, section)]
    if experiment.kind == "ranks":
        return [d for section in report.sections for d in _ranks(experiment, section)]
    return []


def draw(report: Report) -> list[Path]:
    """Draw the figures of an experiment beside its tables, as PNG and SVG, and name them there.

    Returns:
        The files.
    """
    drawings = figures_of(report)
    paths = [report.folder / f"{one.name}{suffix}" for one in drawings for suffix in SUFFIXES]
    for path, one in zip(paths, (one for one in drawings for _ in SUFFIXES), strict=True):
        one.save(path)
    if drawings:
        report.write(figures={f"{one.name}.png": one.caption for one in drawings})
    return paths


def _budgets(experiment: Experiment, section: Section) -> list[Drawing]:
    """Each task's own measure, and the cross-entropy of the right answers."""
    drawings = []
    for what, suffix in (("score", ""), (CROSS_ENTROPY, f"-{CROSS_ENTROPY}")):
        panels = []
        for task in experiment.tasks:
            entries = [entry for entry in section.entries if entry.task == task]
            names = [name for entry in entries for name in entry.measures[:1]]
            measure = CROSS_ENTROPY if suffix else next(iter(names), "")
            curves = [_curve(method, entries, measure) for method in experiment.methods]
            if any(curve.points for curve in curves):
                panels.append(Panel(title=f"{task}, {measure}", curves=curves))
        if panels:
            drawings.append(
                Drawing(
                    name=f"{experiment.name}-{section.terms}{suffix}",
                    title=f"{what.capitalize()} by budget",
                    caption=f"{what.capitalize()} by budget, {TERMS[section.terms]}: a dot for "
                    "every seed, the line through their mean; it has a gap where a run failed.",
                    draw=partial(_draw_budgets, panels),
                )
            )
    return drawings


def _curve(method: str, entries: Sequence[Entry], measure: str) -> Curve:
    own = sorted((e for e in entries if e.method == method), key=lambda entry: entry.rank)
    values = {entry.rank: list(entry.values(measure).values()) for entry in own}
    whole = {entry.rank for entry in own if not entry.failures}
    return Curve(
        method=method,
        points={rank: found for rank, found in values.items() if found},
        means={
            rank: statistics.fmean(found) if found and rank in whole else math.nan
            for rank, found in values.items()
        },
    )


def _draw_budgets(panels: Sequence[Panel]) -> Figure:
    made, grid = figures(len(panels), size=SIZE if len(panels) == 1 else PANEL)
    handles: list[Any] = []
    for axes, panel in zip(grid, panels, strict=True):
        handles = [
            _draw_curve(axes, curve, index, shift=2 ** (APART * _from_middle(index, panel.curves)))
            for index, curve in enumerate(panel.curves)
        ]
        axes.set_title(panel.title, loc="left", color=LIGHT["ink"])
        _by_rank(axes, sorted({rank for curve in panel.curves for rank in curve.means}))
    legend(made, handles, [curve.method for curve in panels[0].curves])
    return made


def _draw_curve(axes: Axes, curve: Curve, index: int, *, shift: float) -> Any:
    """The line of the means, over the fainter dots of the seeds."""
    dots = [(rank * shift, value) for rank, values in curve.points.items() for value in values]
    axes.plot(
        [x for x, _ in dots],
        [y for _, y in dots],
        **{**look(index), "linestyle": "none"},
        marker="o",
        markersize=3,
        markeredgewidth=0,
        alpha=0.45,
    )
    x = [rank * shift for rank in curve.means]
    (line,) = axes.plot(x, list(curve.means.values()), **look(index), marker="o", markersize=4.2)
    return line


def _from_middle(index: int, of: Sequence[object]) -> float:
    return index - (len(of) - 1) / 2


def _by_rank(axes: Axes, ranks: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("budget, as LoRA's rank")


def _ranks(experiment: Experiment, section: Section) -> list[Drawing]:
    """One figure, with every method and task side by side in the same colours."""
    panels = []
    for entry in section.entries:
        known = [result["ranks"] for result in entry.results.values() if result["ranks"]]
        if known:
            title = f"{entry.name} on {entry.task}"
            panels.append(HeatPanel(title=title, ranks=mean_ranks(known), budget=entry.rank))
    if not panels:
        return []
    seeds = max(panel.ranks.num_seeds for panel in panels)
    over = "" if seeds == 1 else f", the mean over {seeds} seeds"
    return [
        Drawing(
            name=f"{experiment.name}-{section.terms}",
            title=experiment.title,
            caption=f"{experiment.title}, {TERMS[section.terms]}: by layer (down) and kind of "
            f"module{over}; below, the mean of each kind. Blue has more ranks than LoRA with the "
            "same budget, orange fewer.",
            draw=partial(_draw_heat, panels),
        )
    ]


def _draw_heat(panels: Sequence[HeatPanel]) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    kinds = list(dict.fromkeys(kind for panel in panels for kind in panel.ranks.kinds))
    layers = sorted({layer for panel in panels for layer in panel.ranks.layers})
    changes = [v - panel.budget for panel in panels for v in panel.ranks.cells.values()]
    norm = TwoSlopeNorm(0, vmin=min(-2, *changes), vmax=max(2, *changes))
    colours = LinearSegmentedColormap.from_list("fewer-more", COLOURS)
    width = 0.35 + COLUMN * len(kinds)
    height = max(LOWEST, ROW * (len(layers) + 2)) + 0.07 * max(map(len, kinds)) + 0.75
    made, grid = figures(len(panels), size=(width, height), most_columns=4)
    for axes, panel in zip(grid, panels, strict=True):
        _draw_panel(axes, panel, layers, kinds, norm=norm, colours=colours)
    grid[0].set_ylabel("layer")
    bar = made.colorbar(
        ScalarMappable(norm, colours), ax=grid, location="bottom", aspect=32, pad=0.02
    )
    budgets = {panel.budget for panel in panels}
    low, high = norm.vmin or 0.0, norm.vmax or 0.0
    ticks = sorted({math.ceil(low), round(low / 2), 0, round(high / 2), math.floor(high)})
    if len(budgets) == 1:
        (budget,) = budgets
        bar.set_ticks(ticks, labels=[str(budget + tick) for tick in ticks])
        bar.set_label(f"rank (white: {budget}, LoRA's)")
    else:
        bar.set_ticks(ticks, labels=[f"{tick:+d}" if tick else "0" for tick in ticks])
        bar.set_label("ranks more than LoRA's")
    bar.outline.set_visible(False)
    return made


def _draw_panel(
    axes: Axes,
    panel: HeatPanel,
    layers: Sequence[int],
    kinds: Sequence[str],
    *,
    norm: Normalize,
    colours: Colormap,
) -> None:
    """Layers down, kinds across, and in a row of its own below them the mean of each kind."""
    import numpy as np

    cells = panel.ranks.cells
    values = np.array([[cells.get((layer, kind), np.nan) for kind in kinds] for layer in layers])
    means = [
        [v for layer in layers if (v := cells.get((layer, kind))) is not None] for kind in kinds
    ]
    mean = np.array([[statistics.fmean(found) if found else np.nan for found in means]])
    across, below = np.arange(len(kinds) + 1), len(layers) + 0.35
    whole = all(float(value).is_integer() for value in cells.values())
    for rows, top, form in ((values, 0.0, ".0f" if whole else ".1f"), (mean, below, ".1f")):
        axes.pcolormesh(
            across,
            top + np.arange(len(rows) + 1),
            rows - panel.budget,
            cmap=colours,
            norm=norm,
            edgecolors=LIGHT["paper"],
            linewidth=1.0,
        )
        for (row, column), value in np.ndenumerate(rows):
            if not math.isnan(value):
                red, green, blue, _ = colours(norm(value - panel.budget))
                is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axes.text(
                    column + 0.5,
                    top + row + 0.5,
                    format(value, form),
                    ha="center",
                    va="center_baseline",
                    fontsize=7,
                    color=LIGHT["paper"] if is_dark else LIGHT["ink"],
                )
    axes.grid(visible=False)
    axes.set_title(panel.title, loc="left", color=LIGHT["ink"])
    axes.set_ylim(below + 1, 0)
    axes.set_xticks(across[:-1] + 0.5, kinds, rotation=90 if max(map(len, kinds)) > 3 else 0)
    names = [*(layer_name(layer) for layer in layers), "mean"]
    axes.set_yticks([*(n + 0.5 for n in range(len(layers))), below + 0.5], names)
    axes.spines[:].set_visible(False)
