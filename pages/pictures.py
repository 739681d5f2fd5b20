"""Draws the pictures of docs/concepts.md: python pages/pictures.py.

What the picture of a round shows is what `loralloc.plan` decides on the scores below.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch

from loralloc import Limits, Plan, Scores, plan

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
IMPORTANCE = {
    "q_proj": (0.9, 0.15, 0.5),
    "v_proj": (1.4, 0.8, 1.1),
    "up_proj": (0.7, 0.6, 1.0),
    "down_proj": (0.05, 0.3, 0.1),
}
"""Of three ranks of each module, made up."""

NUM_PRUNED = 3
UNEQUAL = {"q_proj": 2, "v_proj": 5, "up_proj": 4, "down_proj": 0}

INK, SOFT, FROZEN, STAYS, GOES, COMES = (
    "#1f2933",
    "#616e7c",
    "#cbd2d9",
    "#3f51b5",
    "#c0392b",
    "#1e8449",
)


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


def round_of_allocation() -> str:
    """Score, plan and resize, side by side."""
    decided = decision()
    parts = [
        *(text(20 + 220 * i, 26, word, size=15, bold=True) for i, word in enumerate(STEPS)),
        *(text(20 + 220 * i, 44, words) for i, words in enumerate(STEPS.values())),
        *(arrow(204 + 220 * i, 21) for i in range(2)),
    ]
    for row, (module, values) in enumerate(IMPORTANCE.items()):
        top = 60 + 38 * row
        gone = decided.pruned.get(module, ())
        for rank, value in enumerate(values):
            y = top + 10 * rank
            parts.append(bar(90, y, 70 * value, STAYS))
            parts.append(bar(310, y, 70 * value, GOES if rank in gone else STAYS))
        parts.append(text(84, top + 18, module, anchor="end"))
        if added := decided.added.get(module, 0):
            parts.append(text(310 + 70 * max(values) + 8, top + 19, f"+{added}", COMES, bold=True))
        elif gone:
            lost = f"−{len(gone)}"
            parts.append(text(310 + 70 * max(values) + 8, top + 19, lost, GOES, bold=True))
        after = [STAYS] * len(decided.kept[module]) + [COMES] * added
        parts += [box(530 + 14 * i, top + 6, 11, 16, colour) for i, colour in enumerate(after)]
        parts.append(text(530 + 14 * len(after) + 6, top + 19, f"r = {len(after)}"))
    legend = ((STAYS, "a rank"), (GOES, "pruned"), (COMES, "given: B is zero, nothing changes yet"))
    for x, (colour, words) in zip((90, 170, 250), legend, strict=True):
        parts += [box(x, 220, 11, 11, colour), text(x + 16, 230, words, SOFT)]
    return svg(660, 244, parts, "A round of allocation: score, plan, resize")


STEPS = {
    "1  Score": "what each rank contributes",
    "2  Plan": "the lowest go, others receive",
    "3  Resize": "as many ranks as before",
}


def decision() -> Plan:
    """What `plan` decides on the scores above."""
    terms = {name: torch.tensor(values) for name, values in IMPORTANCE.items()}
    return plan(Scores(terms={"importance": terms}), Limits(num_pruned=NUM_PRUNED))


def unequal_ranks() -> str:
    """Four modules, each a frozen weight and a product as thin as its rank."""
    parts = []
    for i, (module, rank) in enumerate(UNEQUAL.items()):
        left = 20 + 178 * i
        parts.append(text(left, 26, module, bold=True))
        parts.append(box(left, 40, 60, 60, FROZEN))
        parts.append(text(left + 30, 75, "W0", anchor="middle"))
        if rank:
            thin = 4 * rank
            parts.append(text(left + 66, 75, "+"))
            parts.append(box(left + 78, 40, thin, 60, STAYS))
            parts.append(box(left + 82 + thin, 40, 60, thin, COMES))
            parts.append(text(left + 78, 116, "B", STAYS))
            parts.append(text(left + 82 + thin + 26, 40 + thin + 16, "A", COMES))
        parts.append(text(left, 138, f"r = {rank}" + ("" if rank else ": out of the adapter")))
    return svg(720, 150, parts, "Modules with unequal ranks")


def budgets() -> str:
    """Ranks held over a run: ours flat, AdaLoRA's from above."""
    left, right, top, floor = 70, 560, 30, 170
    budget, above = 110, 62
    rounds = [left + 49 * n for n in (3, 4, 5, 6)]
    return svg(
        660,
        214,
        [
            line([(left, top), (left, floor), (right, floor)], SOFT),
            text(left, 190, "start"),
            text(right, 190, "end of the run", anchor="end"),
            text(64, 114, "budget", anchor="end"),
            line([(left, budget), (right, budget)], STAYS, width=3),
            text(right + 8, budget + 12, "ALoRA, LoRA", STAYS),
            line(
                [(left, above), (160, above), (240, 82), (330, 102), (400, 107), (right, 107)],
                GOES,
                width=2,
            ),
            text(166, above - 4, "AdaLoRA", GOES),
            *(circle(x, budget, COMES) for x in rounds),
            text(rounds[0] - 6, budget + 26, "rounds: ranks move, their number stays", COMES),
            text(left + 6, top + 4, "ranks in use", SOFT),
        ],
        "Ranks held over a run",
    )


PICTURES = {"round": round_of_allocation, "unequal": unequal_ranks, "budget": budgets}
"""Every picture by the name of its file."""


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    """A picture on white, so that it can be read on a dark page too."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="12" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(
    x: float,
    y: float,
    words: str,
    colour: str = INK,
    *,
    size: int = 12,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
        f"{weight}>{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}" rx="2" '
        f'fill="{colour}"/>'
    )


def bar(x: float, y: float, length: float, colour: str) -> str:
    """How important a rank is."""
    return box(x, y, max(length, 2), 8, colour)


def line(points: list[tuple[float, float]], colour: str, *, width: int = 1) -> str:
    """A line through points."""
    joined = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def circle(x: float, y: float, colour: str) -> str:
    """A dot on a line."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{colour}"/>'


def arrow(x: float, y: float) -> str:
    """From one step to the next."""
    return f'<path d="M{x} {y - 7}l10 7l-10 7" fill="none" stroke="{SOFT}" stroke-width="2"/>'


if __name__ == "__main__":
    main()
