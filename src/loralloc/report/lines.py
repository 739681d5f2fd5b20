"""Figures of lines, one for every run: learning curves, churn, the cost of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loralloc.report.drawing import LIGHT, Drawing, figure, legend, look, short_number
from loralloc.report.folders import TrainedRun
from loralloc.report.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Callable[[TrainedRun], tuple[Sequence[float], Sequence[float]]]
"""What a run's line is drawn through."""

SMOOTH_FROM = 80
"""Points from which a curve is drawn as a running mean over a fortieth of them."""

CURVES = (
    ("training-loss", "loss", "Training loss"),
    ("development-loss", "eval_loss", "Development loss"),
    ("development-accuracy", "eval_accuracy", "Development accuracy"),
)
"""File, name in the log, title."""


def learning_curves(series: Sequence[Series]) -> list[Drawing]:
    """Training loss, and what was measured on development examples."""
    drawings = []
    for name, key, title in CURVES:
        points: Points = partial(TrainedRun.curve, name=key)
        if not (drawn := with_points(series, points)):
            continue
        many = max(len(points(run)[0]) for one in drawn for run in one.runs) >= SMOOTH_FROM
        rounds = any(run.moves for one in drawn for run in one.runs)
        parts = ["By optimiser step"]
        parts += ["running means"] * many + ["ticks on the axis are rounds of allocation"] * rounds
        draw = partial(_curves, drawn, points, smooth=many, told=len(series) > 1)
        drawings.append(Drawing(name=name, title=title, caption=f"{'; '.join(parts)}.", draw=draw))
    return drawings


def round_lines(series: Sequence[Series]) -> list[Drawing]:
    """Churn, and what a round cost; nothing where there were no rounds."""
    drawings, told = [], len(series) > 1
    if drawn := with_points(series, _churn):
        drawings.append(
            Drawing(
                name="churn",
                title="Churn",
                caption="Share of the ranks given in the round before that a round prunes again: "
                "0% where all that is new proves itself.",
                draw=partial(_by_round, drawn, _churn, form="{:.0%}".format, top=1.0, told=told),
            )
        )
    if drawn := with_points(series, _seconds):
        drawings.append(
            Drawing(
                name="round-cost",
                title="Cost of a round",
                caption="Seconds of scoring, planning and resizing.",
                draw=partial(
                    _by_round, drawn, _seconds, form="{:.3g} s".format, top=None, told=told
                ),
            )
        )
    return drawings


def with_points(series: Sequence[Series], points: Points) -> list[Series]:
    """The series with those of their runs that have something to draw."""
    kept = ((one, [run for run in one.runs if points(run)[0]]) for one in series)
    return [Series(index=one.index, label=one.label, runs=runs) for one, runs in kept if runs]


def _churn(run: TrainedRun) -> tuple[list[float], list[float]]:
    rounds = run.moves.rounds if run.moves else []
    told = [(entry.round, entry.churn) for entry in rounds if entry.churn is not None]
    return [number for number, _ in told], [share for _, share in told]


def _seconds(run: TrainedRun) -> tuple[list[float], list[float]]:
    rounds = run.moves.rounds if run.moves else []
    told = [(entry.round, entry.seconds) for entry in rounds if entry.seconds is not None]
    return [number for number, _ in told], [seconds for _, seconds in told]


def _curves(series: Sequence[Series], points: Points, *, smooth: bool, told: bool) -> Figure:
    made, axes = figure()
    _lines(axes, series, points, smooth=smooth, marker=None if smooth else ".")
    steps = {
        entry.step for one in series for run in one.runs if run.moves for entry in run.moves.rounds
    }
    if steps:
        axes.plot(
            sorted(steps),
            [0.0] * len(steps),
            linestyle="none",
            marker="|",
            markersize=7,
            color=LIGHT["faint"],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(short_number)
    if told:
        legend(made, *_handles(series))
    return made


def _by_round(
    series: Sequence[Series],
    points: Points,
    *,
    form: Callable[[float], str],
    top: float | None,
    told: bool,
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    made, axes = figure()
    _lines(axes, series, points, smooth=False, marker="o")
    axes.set_ylim(0, top)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    if told:
        legend(made, *_handles(series))
    return made


def _lines(
    axes: Axes, series: Sequence[Series], points: Points, *, smooth: bool, marker: str | None
) -> None:
    """A line for every run; those of one series look alike, the more of them the fainter."""
    for one in series:
        alpha = 1.0 if len(one.runs) == 1 else 0.65
        for run in one.runs:
            x, y = points(run)
            if smooth:
                x, y = _running_mean(x, y)
            axes.plot(x, y, marker=marker, markersize=3.5, alpha=alpha, **look(one.index))


def _handles(series: Sequence[Series]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], **look(one.index)) for one in series], [one.label for one in series]


def _running_mean(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], list[float]]:
    width = max(1, len(y) // 40)
    parts = [y[max(0, i - width) : i + 1] for i in range(len(y))]
    return x, [sum(part) / len(part) for part in parts]
