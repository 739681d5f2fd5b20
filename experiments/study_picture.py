"""The map of a ceiling: development loss by learning rate, a line for every rank of LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from loralloc.experiments.collected import Entry, Section
from loralloc.report.drawing import LIGHT, Drawing, figures, legend, look

PANEL = (3.1, 2.5)
"""Inches of a task."""

RATES = (1e-4, 1e-3, 1e-2)
"""Learning rates on the axis."""

CAPTION = (
    "Development loss of LoRA by learning rate, a line for every rank; the dot is a rank's best. "
    "One seed. A best rate at an end of its line may have a better one beyond. A panel near the "
    "loss of guessing (0.69 of two classes) says nothing about ranks: nothing was learnt there."
)


def ceilings(name: str, section: Section) -> Drawing | None:
    """The map of an experiment's searches.

    Args:
        name: Of its file.
        section: What has been run of it.

    Returns:
        The drawing; None where nothing has been searched.
    """
    searched = {
        (entry.task, entry.rank): losses for entry in section.entries if (losses := _finite(entry))
    }
    if not searched:
        return None
    return Drawing(
        name=name,
        title="Development loss by learning rate and rank",
        caption=CAPTION,
        draw=partial(_draw, searched),
    )


def _finite(entry: Entry) -> dict[float, float]:
    """Losses by learning rate of the runs that are there."""
    losses = entry.search.losses if entry.search else {}
    return {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}


def _draw(searched: Mapping[tuple[str, int], Mapping[float, float]]) -> Any:
    tasks = list(dict.fromkeys(task for task, _ in searched))
    ranks = sorted({rank for _, rank in searched})
    made, panels = figures(len(tasks), size=PANEL)
    handles: dict[int, Any] = {}
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task, loc="left")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        bests = []
        for rank in (rank for of, rank in searched if of == task):
            losses, style = searched[task, rank], look(ranks.index(rank))
            (handles[rank],) = axes.plot(list(losses), list(losses.values()), **style)
            best = min(losses, key=lambda rate: losses[rate])
            axes.plot(best, losses[best], "o", color=style["color"], markersize=4)
            bests.append(losses[best])
        axes.set_xlim(1e-4, 3e-2)
        # Rates at which nothing is learnt would hide how near the others are.
        axes.set_ylim(0.95 * min(bests), 1.25 * max(bests))
        axes.tick_params(colors=LIGHT["faint"])
    legend(made, list(handles.values()), [f"r = {rank}" for rank in handles])
    return made
