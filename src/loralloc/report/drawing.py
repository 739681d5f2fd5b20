"""Figures, drawn once: for a page as inline SVG that follows its theme, for files as SVG or PNG.

matplotlib draws them in the colours of the light theme. In a page each of these colours becomes a
variable of the style sheet, so that light, dark and paper need one drawing.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    **{"paper": "#ffffff", "ink": "#262626", "faint": "#6a6a6a", "line": "#e3e1dc"},
    **{"quiet": "#b9bec6", "lost": "#c5560f", "gained": "#2467b3", "spent": "#a8c6e8"},
    **{"run1": "#1f66b1", "run2": "#d4701c", "run3": "#2f8a57", "run4": "#8354b5"},
    **{"run5": "#bf3a56", "run6": "#17919d", "run7": "#876a37", "run8": "#5c6b7a"},
}
"""Every colour by the name of its variable."""

DARK = {
    **{"paper": "#16181c", "ink": "#e8e6e1", "faint": "#a09d96", "line": "#34373d"},
    **{"quiet": "#5d636d", "lost": "#ef8a3d", "gained": "#5da0ec", "spent": "#365980"},
    **{"run1": "#68a8f0", "run2": "#f29a4b", "run3": "#63c18e", "run4": "#b690e6"},
    **{"run5": "#ee7a92", "run6": "#4fc4cf", "run7": "#c7a669", "run8": "#a3b1bf"},
}

RUNS = tuple(name for name in LIGHT if name.startswith("run"))
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Where there are more lines than colours, the colours begin anew with the next of these."""

DPI = 160
SIZE = (4.7, 2.9)
"""Inches; a phone shows so wide a figure without making its words too small."""

MOST_LABELS = len(RUNS) * len(DASHES)
"""More lines than these look alike."""

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
STYLE: dict[str, Any] = {
    **{"font.size": 8.5, "axes.titlesize": 8.5, "axes.labelsize": 8.5, "legend.fontsize": 8},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.unicode_minus": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"axes.edgecolor": LIGHT["quiet"], "axes.labelcolor": LIGHT["faint"]},
    **{"text.color": LIGHT["ink"], "xtick.color": LIGHT["faint"], "ytick.color": LIGHT["faint"]},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True},
    **{"xtick.minor.size": 0, "ytick.minor.size": 0, "lines.linewidth": 1.5},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": LIGHT["line"]},
    **{"grid.linewidth": 0.8, "legend.frameon": False, "lines.solid_capstyle": "round"},
    # A name from a folder may hold a dollar: it is no formula. The same figure is the same bytes.
    **{"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "loralloc"},
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure that can be drawn."""

    name: str
    """What its file is called, without a suffix."""

    title: str
    caption: str
    """What is to be seen, in a sentence or two."""

    draw: Callable[[], Figure]

    def save(self, path: Path) -> None:
        """Write it as SVG or PNG, by the suffix, in the light theme."""
        with _style():
            self.draw().savefig(path, dpi=DPI, metadata=_no_date(path.suffix))

    def inline(self) -> str:
        """An SVG element for a page whose style sheet has the colours as variables."""
        with _style(), io.BytesIO() as file:
            self.draw().savefig(file, format="svg", transparent=True, metadata=_no_date(".svg"))
            return _for_a_page(file.getvalue(), name=self.name, label=self.title)


def figure(*, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, outside matplotlib's own state."""
    made, (axes,) = figures(1, size=size)
    return made, axes


def figures(
    number: int, *, size: tuple[float, float], most_columns: int = 2
) -> tuple[Figure, list[Axes]]:
    """A figure with several pairs of axes, row by row.

    Args:
        number: Of the pairs.
        size: Width and height of each, in inches.
        most_columns: Pairs beside each other at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(number, most_columns)
    rows = math.ceil(number / columns)
    made = Figure(
        figsize=(size[0] * columns, size[1] * rows),
        layout="constrained",
        facecolor=LIGHT["paper"],
    )
    FigureCanvasAgg(made)
    return made, [made.add_subplot(rows, columns, n + 1) for n in range(number)]


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number."""
    return {
        "color": LIGHT[RUNS[index % len(RUNS)]],
        "linestyle": DASHES[index // len(RUNS) % len(DASHES)],
    }


def legend(made: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Say below the axes which line is whose, unless there are more than can be told apart."""
    if not 0 < len(labels) <= MOST_LABELS:
        return
    columns = max(1, min(len(labels), 72 // (max(map(len, labels)) + 7)))
    # matplotlib drops labels that begin with an underscore, so that they are put in afterwards.
    box = made.legend(handles, ["x"] * len(labels), loc="outside lower left", ncols=columns)
    for text, label in zip(box.get_texts(), labels, strict=True):
        text.set_text(label)
    width, height = made.get_size_inches()
    made.set_size_inches(width, height + 0.16 * (math.ceil(len(labels) / columns) - 1))


def short_number(value: float, _: object = None) -> str:
    """A number for an axis: "2.4M", "80k", "12"."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{sign}"
    return f"{value:.3g}"


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name may hold letters that matplotlib's font has not; a browser's has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _no_date(suffix: str) -> dict[str, Any]:
    return {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}


def _for_a_page(svg: bytes, *, name: str, label: str) -> str:
    """The SVG with colours as variables, ids of its own, and no size but its shape."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK[1:].partition("}")[0])
    root = ElementTree.fromstring(svg)
    for child in list(root):
        if child.tag == f"{{{SVG}}}metadata":
            root.remove(child)
    for part in root.iter():
        for style in list(part):  # of all elements of the page, if it stayed
            if style.tag == f"{{{SVG}}}style":
                part.remove(style)
        for key, value in list(part.attrib.items()):
            if key == "id":
                part.set(key, f"{name}-{value}")
            elif key == LINK and value.startswith("#"):
                part.set(key, f"#{name}-{value[1:]}")
            elif key in ("d", "x", "y", "transform"):
                part.set(key, re.sub(r"-?\d+\.\d{3,}", _rounded, value))
            else:
                part.set(key, _themed(value.replace("url(#", f"url(#{name}-")))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _rounded(match: re.Match[str]) -> str:
    """Hundredths of a point: what nobody sees weighs nothing."""
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _themed(value: str) -> str:
    names = {colour: name for name, colour in LIGHT.items()}
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], value
    )
