"""Figures of one run's rounds: who gave ranks and who received, and how the scores lay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loralloc.report.drawing import LIGHT, SIZE, Drawing, figure, legend
from loralloc.report.folders import TrainedRun, shown
from loralloc.report.rounds import Flow, ScoredRound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 48
OVERLAP = 1.7
"""Height of a round's distribution, in distances from one to the next."""


def flow_drawings(run: TrainedRun, *, name: str) -> list[Drawing]:
    """Ranks given and received by kind of module and by layer, over all rounds.

    Args:
        run: Whose.
        name: What the files' names begin with.
    """
    moves = run.moves
    if moves is None or not moves.rounds:
        return []
    drawings = []
    for what, flows in (
        ("kind", {shown(kind, longest=24): flow for kind, flow in moves.by_kind.items()}),
        ("layer", {str(layer): flow for layer, flow in moves.by_layer.items()}),
    ):
        if len(flows) > 1:
            drawings.append(
                Drawing(
                    name=f"{name}-flows-by-{what}",
                    title=f"Who gave and who received, by {what}",
                    caption="Ranks given up and ranks received, over all rounds; what is fainter "
                    "was pruned again by a later one.",
                    draw=partial(_flows, flows, what),
                )
            )
    return drawings


def score_drawings(run: TrainedRun, *, name: str) -> list[Drawing]:
    """The distribution of every term of the score, round after round.

    Args:
        run: Whose.
        name: What the files' names begin with.
    """
    moves = run.moves
    if moves is None:
        return []
    return [
        Drawing(
            name=f"{name}-scores-{_plain(term)}",
            title=f"Scores: “{shown(term)}”",
            caption="All ranks of each round, the first at the bottom; those that it pruned in the "
            "other colour. The axis is linear around 0 and logarithmic beyond.",
            draw=partial(_ridges, moves.rounds, term),
        )
        for term in moves.terms
    ]


def _flows(flows: Mapping[str, Flow], what: str) -> Figure:
    """Layers stand side by side, as in a heat map of ranks; kinds, which have names, below."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    lies = what == "kind"
    height = max(SIZE[1], 0.8 + 0.17 * len(flows)) if lies else SIZE[1]
    made, axes = figure(size=(SIZE[0], height))
    places = list(range(len(flows)))
    gave = [-flow.gave for flow in flows.values()]
    stay, gone = ([getattr(flow, part) for flow in flows.values()] for part in ("stay", "gone"))
    bars, start = (axes.barh, "left") if lies else (axes.bar, "bottom")
    draw: Any = partial(bars, places)
    for lengths, colour, more in (
        (gave, "lost", {}),
        (stay, "gained", {}),
        (gone, "spent", {start: stay}),
    ):
        draw(lengths, 0.68, color=LIGHT[colour], **more)
    step = 1 if lies else 1 + len(flows) // 18  # so that no label stands on another
    ranks, names = (axes.xaxis, axes.yaxis) if lies else (axes.yaxis, axes.xaxis)
    names.set_ticks(places[::step], list(flows)[::step])
    names.grid(visible=False)
    ranks.grid(visible=True)
    ranks.set_major_locator(MaxNLocator(integer=True, nbins=7))
    ranks.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ranks.set_label_text("ranks")
    names.set_label_text("" if lies else what)
    if lies:
        axes.invert_yaxis()
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
    else:
        axes.axhline(0, color=LIGHT["faint"], linewidth=0.8)
    colours = ("lost", "gained", "spent")
    legend(made, [Patch(color=LIGHT[c]) for c in colours], ["gave", "received", "and gave again"])
    return made


def _ridges(rounds: Sequence[ScoredRound], term: str) -> Figure:
    from matplotlib.patches import Patch

    parts = [
        (entry.kept_values.get(term, ()), entry.pruned_values.get(term, ())) for entry in rounds
    ]
    values = sorted(abs(v) for kept, pruned in parts for v in (*kept, *pruned))
    unit = values[len(values) // 2] or max(values, default=0.0) or 1.0
    bent = [tuple([math.asinh(v / unit) for v in part] for part in pair) for pair in parts]
    low = min((v for k, p in bent for v in (*k, *p)), default=-1.0)
    high = max((v for k, p in bent for v in (*k, *p)), default=1.0)
    width = (high - low or 1.0) / NUM_BINS
    edges = [low + i * width for i in range(NUM_BINS + 1)]
    counted = [(_count(k, low, width), _count(p, low, width)) for k, p in bent]
    most = max((sum(pair) for k, p in counted for pair in zip(k, p, strict=True)), default=0) or 1

    made, axes = figure(size=(SIZE[0], max(SIZE[1], 1.0 + 0.24 * len(rounds))))
    for place, (kept, pruned) in reversed(list(enumerate(counted))):
        middle = [place + OVERLAP * n / most for n in pruned]
        top = [place + OVERLAP * (n + m) / most for n, m in zip(pruned, kept, strict=True)]
        order = 2 * (len(rounds) - place)
        options: dict[str, Any] = {"fill": True, "linewidth": 0, "zorder": order}
        axes.stairs(top, edges, baseline=place, color=LIGHT["quiet"], **options)
        axes.stairs(middle, edges, baseline=place, color=LIGHT["lost"], **options)
        line: dict[str, Any] = {"color": LIGHT["faint"], "linewidth": 0.5, "zorder": order + 1}
        axes.stairs(top, edges, baseline=place, **line)
    axes.set_yticks(range(len(rounds)), [str(entry.round) for entry in rounds])
    axes.set_ylabel("round")
    axes.set_ylim(-0.1, len(rounds) - 1 + OVERLAP + 0.1)
    ticks = _ticks(unit, low, high)
    axes.set_xticks([math.asinh(tick / unit) for tick in ticks], [_scientific(t) for t in ticks])
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    handles = [Patch(color=LIGHT["quiet"]), Patch(color=LIGHT["lost"])]
    legend(made, handles, ["stayed", "pruned in this round"])
    return made


def _count(values: Sequence[float], low: float, width: float) -> list[int]:
    counts = [0] * NUM_BINS
    for value in values:
        counts[min(int((value - low) / width), NUM_BINS - 1)] += 1
    return counts


def _ticks(unit: float, low: float, high: float) -> list[float]:
    """0 and powers of ten on both sides of it, as many as have room.

    Args:
        unit: Where the axis turns from linear to logarithmic.
        low: The axis' left end, bent as values are.
        high: Its right end.
    """
    far = max(unit * math.sinh(high), -unit * math.sinh(low))
    powers = [10.0**e for e in range(math.floor(math.log10(unit)), 300) if 10.0**e <= far]
    ticks, room = [0.0], 0.09 * (high - low)
    taken = [0.0]
    for power in powers:
        place = math.asinh(power / unit)
        if place - taken[-1] >= room:
            taken.append(place)
            ticks += [power, -power]
    return sorted(tick for tick in ticks if low <= math.asinh(tick / unit) <= high)


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    small = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'−' if value < 0 else ''}10{small}"


def _plain(term: str) -> str:
    """A term's name for a file."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in shown(term, longest=24))
