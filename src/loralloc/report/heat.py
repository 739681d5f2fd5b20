"""The ranks of a run by layer and kind of module at every round, for a page's heat map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loralloc.report.folders import TrainedRun, shown
from loralloc.report.grid import RankChange, RankGrid

WEAKEST = 0.22
"""Strength of the colour of a change of one rank; that of the largest is 1."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A module in the heat map, as it is after the last round."""

    layer: int
    """Place of its layer; -1 outside the layers."""

    kind: int
    label: str
    """What it is, in words."""

    rank: int
    side: str
    """"lost", "gained" or "same"."""

    share: float
    """Strength of its colour."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A run's modules, and their ranks at every round for the script of the page."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: tuple[Cell, ...]
    data: Mapping[str, Any]
    """"start" ranks, and for each of "rounds" its step, "ranks" and the "new" ones among them that
    no round has scored; "most" is the largest change, which has the strongest colour."""

    @property
    def outside(self) -> tuple[Cell, ...]:
        """The modules in no layer."""
        return tuple(cell for cell in self.cells if cell.layer < 0)


def heat_map(run: TrainedRun) -> HeatMap:
    """The heat map of a run that moved ranks."""
    assert run.allocation is not None, "asked only of a run that moved ranks"
    last = run.grid()
    steps = [0, *(int(entry["step"]) for entry in run.allocation["rounds"])]
    rounds, told = [], []
    for number, step in enumerate(steps):
        ranks = [cell.now for cell in run.grid(number).modules]
        scored = [cell.now for cell in run.grid(number, scored=True).modules]
        new = [now - old for now, old in zip(ranks, scored, strict=True)]
        rounds.append(ranks)
        told.append({"step": step, "ranks": ranks, "new": new})
    start = [cell.start for cell in last.modules]
    changes = [abs(now - old) for entry in rounds for now, old in zip(entry, start, strict=True)]
    most = max(changes, default=0)
    return HeatMap(
        layers=last.layers,
        kinds=tuple(shown(kind, longest=24) for kind in last.kinds),
        cells=tuple(_cells(last, most)),
        data={"start": start, "rounds": told, "most": most, "weakest": WEAKEST},
    )


def _cells(grid: RankGrid, most: int) -> list[Cell]:
    places = [
        (grid.layers.index(layer), grid.kinds.index(kind), f"layer {layer}, {shown(kind)}", cell)
        for (layer, kind), cell in grid.cells.items()
    ]
    places += [(-1, -1, shown(name), cell) for name, cell in grid.others.items()]
    return [
        Cell(
            layer=layer,
            kind=kind,
            label=label,
            rank=cell.now,
            side="lost" if cell.change < 0 else "gained" if cell.change else "same",
            share=_share(cell, most),
        )
        for layer, kind, label, cell in places
    ]


def _share(cell: RankChange, most: int) -> float:
    if not cell.change:
        return 0.0
    return round(WEAKEST + (1 - WEAKEST) * (abs(cell.change) - 1) / max(most - 1, 1), 3)
