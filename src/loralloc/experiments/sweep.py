"""A search over learning rates, ranks and methods: where the optimum is, and whether inside.

Every point is trained with every seed and compared by its development loss at the end.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.files import write_json
from loralloc.experiments.rows import hash_of
from loralloc.experiments.work import Outcome
from loralloc.methods.catalog import get_method
from loralloc.methods.method import DEFAULT_RANK
from loralloc.methods.rslora import RsLora
from loralloc.training.seal import CHECKPOINTS

SCALE = 2
"""alpha / r where no `lora_alpha` is given: that of a run by default."""

BEST, TABLE = "best", "sweep.json"
"""Names in the folder of a sweep: the best run's adapter, and the table."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is compared: one choice of everything but the seed."""

    method: str
    rank: int
    learning_rate: float
    losses: Mapping[int, float]
    """Development loss by seed."""

    failures: Mapping[int, str] = field(default_factory=dict)
    """Why a seed has none, by seed."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def error(self) -> float | None:
        """The standard error of the mean over seeds; None of one seed."""
        count = len(self.losses)
        return statistics.stdev(self.losses.values()) / count**0.5 if count > 1 else None

    @property
    def is_whole(self) -> bool:
        """Whether every seed has a loss."""
        return not self.failures


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One option that is searched over."""

    flag: str
    values: tuple[float, ...]
    best: float

    @property
    def hint(self) -> str:
        """What to do about the edge that the optimum is at; empty where it is inside."""
        ordered = sorted(self.values)
        if len(ordered) < 2 or self.best not in (ordered[0], ordered[-1]):
            return ""
        is_lowest = self.best == ordered[0]
        step = ordered[1] / ordered[0] if is_lowest else ordered[-1] / ordered[-2]
        beyond = self.best / step if is_lowest else self.best * step
        if self.flag == "--r":
            beyond = float(int(beyond))
            if beyond < 1:
                return ""  # there is no rank below 1
        side = "smallest" if is_lowest else "largest"
        return (
            f"The best {self.flag} is {self.best:g}, the {side} that was tried, so the optimum may "
            f"lie beyond it; search on with {self.flag} {beyond:g}."
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a sweep found."""

    points: tuple[Point, ...]
    """In the order of methods, ranks and rates."""

    best: Point
    """The lowest mean loss of those with every seed."""

    cell: Cell
    """The run of the lowest loss among the best point's."""

    near: tuple[Point, ...]
    """Others that the noise of the seeds does not tell from the best."""

    edges: tuple[str, ...]
    """What to do about edges that the optimum is at."""

    def as_data(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "points": [_as_data(point) for point in self.points],
            "best": {**_as_data(self.best), "folder": str(self.cell.folder)},
            "not_told_apart": [_name(point) for point in self.near],
            "edges": list(self.edges),
        }


def cells(
    options: Mapping[str, Any],
    *,
    methods: Sequence[str],
    ranks: Sequence[int],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    root: Path,
) -> list[Cell]:
    """The runs of a sweep.

    Args:
        options: Of every run, flat; with `lora_alpha` it is one at all ranks, and otherwise
            alpha / r is, or rsLoRA's alpha.
        methods: Of the LoRA family, by name.
        ranks: LoRA's r.
        learning_rates: The highest of the schedule.
        seeds: Of the runs.
        root: The folder of the sweep.

    Raises:
        ValueError: There is nothing to search over, or a value comes twice.
    """
    searched = {"method": methods, "r": ranks, "learning_rate": learning_rates, "seed": seeds}
    for name, values in searched.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"`{name}` is {', '.join(map(str, values)) or 'empty'}; give each value once, with "
                "commas between them."
            )
    if len(methods) * len(ranks) * len(learning_rates) == 1:
        raise ValueError(
            "There is nothing to search over; give several values, such as `--learning_rate "
            "5e-4,1e-3,2e-3` or `--r 2,4,8`."
        )
    source = options.get("dataset_name")
    data = options.get("task") or Path(str(source or "data")).stem
    rows = hash_of(source)
    made = []
    for method, rank, rate, seed in itertools.product(methods, ranks, learning_rates, seeds):
        alpha = {} if "lora_alpha" in options else {"lora_alpha": _alpha(method, rank, options)}
        own = {"method": method, "lora_r": rank, "learning_rate": rate, "seed": seed}
        made.append(
            Cell(
                backbone=str(options["model_name_or_path"]),
                task=str(data),
                method=method,
                rank=rank,
                seed=seed,
                learning_rate=rate,
                options={"disable_tqdm": True, **options, **alpha, **own},
                rows=rows,
                root=str(root / "cells"),
            )
        )
    return made


def _alpha(method: str, rank: int, options: Mapping[str, Any]) -> int:
    """LoRA's alpha, with which s = alpha / r is one at all ranks; rsLoRA's own is, and s falls."""
    by_root = issubclass(get_method(method), RsLora) or options.get("use_rslora")
    return SCALE * (DEFAULT_RANK if by_root else rank)


def find(outcomes: Iterable[Outcome]) -> Found:
    """Compare what came of the runs.

    Raises:
        RuntimeError: No point was trained with every seed.
    """
    by_point: dict[tuple[str, int, float], list[Outcome]] = {}
    for one in outcomes:
        key = (one.cell.method, one.cell.rank, one.cell.learning_rate)
        by_point.setdefault(key, []).append(one)
    points = [
        Point(
            method=method,
            rank=rank,
            learning_rate=rate,
            losses={o.cell.seed: float(o.result["dev_loss"]) for o in some if o.result},
            failures={o.cell.seed: o.failure for o in some if not o.result},
        )
        for (method, rank, rate), some in by_point.items()
    ]
    whole = [point for point in points if point.is_whole]
    if not whole:
        reason = next(iter(points[0].failures.values()))
        raise RuntimeError(f"No point was trained with every seed; the first failed: {reason}")
    best = min(whole, key=lambda point: point.mean)
    runs = by_point[best.method, best.rank, best.learning_rate]
    return Found(
        points=tuple(points),
        best=best,
        cell=min(runs, key=lambda one: best.losses[one.cell.seed]).cell,
        near=tuple(other for other in whole if other is not best and _is_near(other, best)),
        edges=tuple(hint for hint in (axis.hint for axis in _axes(points, best)) if hint),
    )


def keep(found: Found, root: Path) -> Path:
    """Copy the best run's folder, without its checkpoints, and write the table beside it.

    Returns:
        The folder of the best run.
    """
    target = root / BEST
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(found.cell.folder, target, ignore=shutil.ignore_patterns(CHECKPOINTS))
    write_json(root / TABLE, found.as_data())
    return target


def _is_near(other: Point, best: Point) -> bool:
    """Whether two points differ by less than twice the error of their difference over seeds."""
    differences = [other.losses[seed] - best.losses[seed] for seed in best.losses]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return bool(statistics.fmean(differences) < 2 * error)


def _axes(points: Sequence[Point], best: Point) -> list[Axis]:
    rates = {point.learning_rate for point in points}
    ranks = {point.rank for point in points}
    return [
        Axis(flag="--learning_rate", values=tuple(rates), best=best.learning_rate),
        Axis(flag="--r", values=tuple(ranks), best=best.rank),
    ]


def _name(point: Point) -> str:
    return f"{point.method} r={point.rank} learning rate {point.learning_rate:g}"


def _as_data(point: Point) -> dict[str, Any]:
    return {
        "method": point.method,
        "r": point.rank,
        "learning_rate": point.learning_rate,
        "losses": {str(seed): loss for seed, loss in point.losses.items()},
        "failures": {str(seed): reason for seed, reason in point.failures.items()},
        "mean": point.mean if point.losses else None,
        "standard_error": point.error,
    }
