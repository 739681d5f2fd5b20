"""Figures of size against quality: the sweep of budgets, the frontier of an adapter that shrank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loralloc.report.drawing import LIGHT, Drawing, figure, legend, look, short_number
from loralloc.report.folders import TrainedRun
from loralloc.report.series import Series, data_of, ends_later, method_of, model_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEVELOPMENT = "lowest development loss"
Sweep = dict[str, dict[int, list[tuple[int, float]]]]
"""Method -> parameters -> for every seed its own parameters and its value."""


def sweeps(series: Sequence[Series]) -> list[Drawing]:
    """What each budget came to, as in Figure 2 of Liu et al. 2024; nothing without several sizes.

    One figure for each backbone, data set and measure in which two sizes of a method can be
    compared. Where a method was run at one size with several settings, as a search for learning
    rates does, that of the lowest development loss is drawn.
    """
    by_place: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        by_place.setdefault((model_of(one.runs[0]), data_of(one.runs[0])), []).append(one)
    drawings: list[Drawing] = []
    for (model, data), there in by_place.items():
        for measure in measures([run for one in there for run in one.runs]):
            sweep = _sweep(there, measure)
            if any(len(sizes) > 1 for sizes in sweep.values()):
                number = len(drawings) + 1
                drawings.append(
                    Drawing(
                        name=f"budgets-{number}",
                        title=f"{measure[0].upper()}{measure[1:]} by budget",
                        caption=f"{model} on {data}: every seed a dot by the parameters that it "
                        "stores, the line through their means. Of several settings at one size "
                        "the one of the lowest development loss.",
                        draw=partial(_draw_sweep, sweep),
                    )
                )
    return drawings


def frontiers(series: Sequence[Series]) -> list[Drawing]:
    """Held-out loss at every size that adapters passed while they shrank."""
    drawn = [one for one in series if any(run.frontier for run in one.runs)]
    if not drawn:
        return []
    return [
        Drawing(
            name="frontier",
            title="Size against held-out loss",
            caption="Every size that an adapter passed while it shrank, the smallest to the left; "
            "a cross is a size that it went back from.",
            draw=partial(_draw_frontier, drawn),
        )
    ]


def measures(runs: Sequence[TrainedRun]) -> list[str]:
    """What runs can be compared by: every figure of an evaluation, and development loss."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    has_loss = any(lowest_loss(run) is not None for run in runs)
    return [*names, DEVELOPMENT] if has_loss else [*names]


def value_of(run: TrainedRun, measure: str) -> float | None:
    """A measure of `measures`; None where the run has it not."""
    return lowest_loss(run) if measure == DEVELOPMENT else run.figures.get(measure)


def lowest_loss(run: TrainedRun) -> float | None:
    """The lowest development loss of its log, once the adapter had the size that it ends with."""
    steps, losses = run.curve("eval_loss")
    since = 0.0
    if run.moves and run.moves.rounds:
        since = run.moves.rounds[-1].step
    elif steps and ends_later(run):
        since = steps[-1]
    counted = (loss for step, loss in zip(steps, losses, strict=True) if step >= since)
    return min(counted, default=None)


def _sweep(series: Sequence[Series], measure: str) -> Sweep:
    """Sizes within 3% of each other are one budget: what methods make of it differs a little."""
    sweep: Sweep = {}
    for one in sorted(series, key=_mean_loss):
        measured = ((run.parameters, value_of(run, measure)) for run in one.runs)
        seeds = [(size, value) for size, value in measured if size and value is not None]
        if not seeds:
            continue
        size = statistics.median_low(size for size, _ in seeds)
        sizes = sweep.setdefault(method_of(one.runs[0]), {})
        if not any(abs(known - size) <= 0.03 * known for known in sizes):
            sizes[size] = seeds
    return sweep


def _mean_loss(series: Series) -> float:
    losses = [loss for run in series.runs if (loss := lowest_loss(run)) is not None]
    return statistics.mean(losses) if losses else math.inf


def _draw_sweep(sweep: Sweep) -> Figure:
    made, axes = figure()
    handles: list[Any] = []
    for index, sizes in enumerate(sweep.values()):
        style = look(index)
        x = sorted(sizes)
        y = [statistics.mean(value for _, value in sizes[size]) for size in x]
        handles += axes.plot(x, y, **style)
        dots = [dot for size in x for dot in sizes[size]]
        axes.plot(
            [size for size, _ in dots],
            [value for _, value in dots],
            **{**style, "linestyle": "none"},
            marker="o",
            markersize=3.5,
            alpha=0.75,
        )
    _by_size(axes, [size for sizes in sweep.values() for size in sizes])
    legend(made, handles, list(sweep))
    return made


def _draw_frontier(series: Sequence[Series]) -> Figure:
    made, axes = figure()
    handles: list[Any] = []
    sizes = []
    for one in series:
        for run in one.runs:
            kept = [size for size in run.frontier if size.kept]
            (line,) = axes.plot(
                [size.parameters for size in kept],
                [size.loss for size in kept],
                marker="o",
                markersize=3.5,
                **look(one.index),
            )
            left = [size for size in run.frontier if not size.kept]
            axes.plot(
                [size.parameters for size in left],
                [size.loss for size in left],
                marker="x",
                markersize=5,
                **{**look(one.index), "linestyle": "none"},
            )
            sizes += [size.parameters for size in run.frontier]
        handles.append(line)
    _by_size(axes, sizes)
    axes.set_ylabel("held-out loss")
    legend(made, handles, [one.label for one in series])
    return made


def _by_size(axes: Axes, sizes: Sequence[int]) -> None:
    """Parameters along the axis, with a tick at each size where these are few."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    ordered = sorted(set(sizes))
    ticks = [ordered[0]]
    for size in ordered[1:]:
        if size > 1.35 * ticks[-1]:
            ticks.append(size)
    axes.set_xticks(ticks, [short_number(tick) for tick in ticks])
    axes.set_xlabel("parameters")
    axes.tick_params(axis="x", colors=LIGHT["faint"])
