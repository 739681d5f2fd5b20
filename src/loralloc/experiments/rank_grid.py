"""Ranks of a run by layer and kind of module, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralloc.allocation.module_names import short_labels, split_name
from loralloc.experiments.tables import Table

OUTSIDE = -1
"""Stands for the layer of a module that is in none."""


@dataclass(frozen=True, kw_only=True)
class MeanRanks:
    """The final rank of every module, the mean over seeds."""

    layers: tuple[int, ...]
    """Ascending; `OUTSIDE` first, where a module is in no layer."""

    kinds: tuple[str, ...]
    """Short labels of the kinds of module, in the model's order."""

    cells: Mapping[tuple[int, str], float]
    """(layer, kind) -> rank. A module that a layer does not have is absent."""

    num_seeds: int


def mean_ranks(ranks: Sequence[Mapping[str, Mapping[str, int]]]) -> MeanRanks:
    """The mean over seeds of every module's final rank.

    Args:
        ranks: Of every seed, at least one, `initial` and `final` by module; a module that left the
            adapter is in the first only, and has rank 0.
    """
    names = list(dict.fromkeys(name for of in ranks for name in (*of["initial"], *of["final"])))
    places = {name: _place(name) for name in names}
    labels = short_labels(list(dict.fromkeys(kind for _layer, kind in places.values())))
    return MeanRanks(
        layers=tuple(sorted({layer for layer, _kind in places.values()})),
        kinds=tuple(labels.values()),
        cells={
            (layer, labels[kind]): statistics.fmean(of["final"].get(name, 0) for of in ranks)
            for name, (layer, kind) in places.items()
        },
        num_seeds=len(ranks),
    )


def layer_name(layer: int) -> str:
    """What heads the row of a layer."""
    return "-" if layer == OUTSIDE else str(layer)


def rank_tables(
    title: str, ranks: Sequence[Mapping[str, Mapping[str, int]]], *, notes: Sequence[str] = ()
) -> list[Table]:
    """The final rank of every module, the mean over seeds; none where no run has ranks.

    Args:
        title: Of the table.
        ranks: As `mean_ranks` takes them, or none.
        notes: Below it.
    """
    if not ranks:
        return []
    found = mean_ranks(ranks)
    cells = {place: f"{value:g}" for place, value in found.cells.items()}
    rows = [
        [layer_name(layer), *(cells.get((layer, kind), "-") for kind in found.kinds)]
        for layer in found.layers
    ]
    said = [f"Mean over {len(ranks)} seeds.", *notes]
    return [Table(title=title, columns=["layer", *found.kinds], rows=rows, notes=said)]


def _place(name: str) -> tuple[int, str]:
    """Layer and kind of a module; `OUTSIDE` where it is in none."""
    found = split_name(name)
    return (found[1], found[2]) if found else (OUTSIDE, name)
