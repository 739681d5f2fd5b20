"""The ranks of a run as a heat map, in the manner of Figure 3 of Liu et al. 2024."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.report.grid import RankGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
DPI = 150
# ranks lost -> as at the start -> ranks gained; the hues of the table in the terminal
COLOURS = ("#a63603", "#e6711b", "#fcbf86", "#f3f2f0", "#9cc3e6", "#3a7fc6", "#08448c")
INK = "#2b2b2b"
FAINT = "#6b6b6b"


def rank_figure(grid: RankGrid, path: Path) -> None:
    """Writes a heat map: module kinds down, layers across, the rank in each cell.

    The colours diverge from the rank that a module started with. No state of matplotlib is
    changed and no window is opened.

    Args:
        grid: The ranks to draw.
        path: The picture to write, as PNG, PDF or SVG by its suffix.

    Raises:
        ValueError: The suffix or the folder of `path` will not do, or no module is in a layer.
    """
    check_picture(path)
    if not grid.cells:
        raise ValueError(
            "No adapted module belongs to a numbered layer, so there is no module-by-layer "
            "picture to draw; leave out --png and read the table."
        )
    figure, axes, bar_axes = _canvas(grid)
    mesh = _draw_cells(axes, grid)
    _draw_bar(figure, bar_axes, mesh, grid)
    _draw_words(axes, grid)
    figure.savefig(path, dpi=DPI)


def check_picture(path: Path) -> None:
    """Tells, before any work is done, whether a picture can be written to `path`.

    Raises:
        ValueError: The suffix is unknown or the folder is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, but a picture is written as one of "
            f"{', '.join(SUFFIXES)}; name it {path.with_suffix('.png').name}, for example."
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"The folder {path.parent} of the picture does not exist; create it first."
        )


def _canvas(grid: RankGrid) -> tuple[Figure, Axes, Axes]:
    """A figure with room for every cell, and in it the axes of the cells and of the bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_kinds = len(grid.layers), len(grid.kinds)
    # inches; few cells are drawn larger, so that titles and the bar's numbers have their room
    cell_width = min(max(0.36, 3.2 / num_layers), 0.8) if num_layers <= 48 else 0.3
    cell_height = max(0.36, 1.4 / num_kinds)
    width, height = cell_width * num_layers, cell_height * num_kinds
    left, right = 0.35 + 0.075 * max(map(len, grid.kinds)), 0.9
    below, above = 0.6 + 0.18 * len(grid.others), 0.75
    right += max(0.0, 4.4 - left - width - right)
    total_width, total_height = left + width + right, below + height + above

    figure = Figure(figsize=(total_width, total_height), facecolor="white")
    FigureCanvasAgg(figure)
    bottom, tall = below / total_height, height / total_height
    axes = figure.add_axes((left / total_width, bottom, width / total_width, tall))
    bar_left = (left + width + 0.18) / total_width
    bar_axes = figure.add_axes((bar_left, bottom, 0.13 / total_width, tall))
    return figure, axes, bar_axes


def _draw_cells(axes: Axes, grid: RankGrid) -> QuadMesh:
    """Colours tell the change from the start, numbers the rank."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    changes = np.full((len(grid.kinds), len(grid.layers)), np.nan)
    for (layer, kind), cell in grid.cells.items():
        changes[grid.kinds.index(kind), grid.layers.index(layer)] = cell.change
    lowest, highest = _span(grid)
    norm = TwoSlopeNorm(0, vmin=lowest, vmax=highest)
    colours = LinearSegmentedColormap.from_list("lost-gained", COLOURS)
    mesh = axes.pcolormesh(changes, cmap=colours, norm=norm, edgecolors="white", linewidth=1.2)
    for (layer, kind), cell in grid.cells.items():
        red, green, blue, _ = colours(norm(cell.change))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(
            grid.layers.index(layer) + 0.5,
            grid.kinds.index(kind) + 0.5,
            str(cell.now),
            ha="center",
            va="center_baseline",
            fontsize=8,
            color="white" if is_dark else INK,
        )
    return mesh


def _span(grid: RankGrid) -> tuple[int, int]:
    """The changes at the two ends of the colours; a change of one rank never reaches an end."""
    changes = [cell.change for cell in grid.cells.values()]
    return min(-2, *changes), max(2, *changes)


def _draw_bar(figure: Figure, axes: Axes, mesh: QuadMesh, grid: RankGrid) -> None:
    """The colour bar: ranks where all modules started alike, else the change."""
    (lowest, highest), start = _span(grid), grid.common_start
    ticks = sorted({lowest, round(lowest / 2), 0, round(highest / 2), highest})
    bar = figure.colorbar(mesh, cax=axes, ticks=ticks)
    labels = [f"{tick:+d}" if tick else "0" for tick in ticks]
    bar.set_ticklabels(labels if start is None else [str(start + tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=INK)
    bar.outline.set_visible(False)
    bar.set_label("ranks gained or lost" if start is None else "rank", fontsize=8, color=FAINT)


def _draw_words(axes: Axes, grid: RankGrid) -> None:
    """Labels, title and what lies outside the layers."""
    for ticks, labels in ((axes.set_xticks, grid.layers), (axes.set_yticks, grid.kinds)):
        ticks([i + 0.5 for i in range(len(labels))], [str(label) for label in labels])
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    outside = [f"{name}: {cell.now} ({cell.change:+d})" for name, cell in grid.others.items()]
    axes.set_xlabel("\n".join(["layer", *outside]), fontsize=8, color=FAINT)
    when = f"after round {grid.shown_round}" if grid.shown_round else "at the start"
    start = grid.common_start
    scored = "scored " if grid.num_new else ""
    budget = f"{grid.total.now:,} {scored}ranks in {len(grid.modules)} modules"
    begun = "" if start is None else f", each started with {start}"
    for words, size, colour, height in (
        (f"LoRA ranks {when}", 11, INK, 24),
        (budget + begun, 8.5, FAINT, 9),
    ):
        axes.annotate(
            words,
            xy=(0, 1),
            xytext=(0, height),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=size,
            color=colour,
        )
