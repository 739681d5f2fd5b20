"""Ranks of a run by layer and kind of module, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from loralloc.allocation.module_names import short_labels, split_name
from loralloc.experiments.tables import Table


def rank_tables(
    title: str, ranks: Sequence[Mapping[str, Mapping[str, int]]], *, notes: Sequence[str] = ()
) -> list[Table]:
    """The final rank of every module, the mean over seeds; none where no run has ranks.

    Args:
        title: Of the table.
        ranks: Of every seed, `initial` and `final` by module; a module that left the adapter is
            in the first only, and has rank 0.
        notes: Below it.
    """
    if not ranks:
        return []
    names = list(dict.fromkeys(name for of in ranks for name in (*of["initial"], *of["final"])))
    mean = {
        name: statistics.fmean(of["final"].get(name, 0) for of in ranks) for name in sorted(names)
    }
    places = {name: _place(name) for name in names}
    kinds = list(dict.fromkeys(kind for _layer, kind in places.values()))
    labels = short_labels(kinds)
    cells = {places[name]: f"{value:g}" for name, value in mean.items()}
    layers = sorted({layer for layer, _kind in places.values()})
    rows = [
        ["-" if layer < 0 else str(layer), *(cells.get((layer, kind), "-") for kind in kinds)]
        for layer in layers
    ]
    columns = ["layer", *(labels[kind] for kind in kinds)]
    said = [f"Mean over {len(ranks)} seeds.", *notes]
    return [Table(title=title, columns=columns, rows=rows, notes=said)]


def _place(name: str) -> tuple[int, str]:
    """Layer and kind of a module; -1 where it is in none."""
    found = split_name(name)
    return (found[1], found[2]) if found else (-1, name)
