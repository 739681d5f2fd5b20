"""What a report reads of run folders. Their strings and numbers are anybody's, and are checked."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loralloc.allocation.files import is_number, read_json
from loralloc.evaluation.predictions import EVAL_NAME
from loralloc.experiments.sweep import BEST, TABLE
from loralloc.methods.in_place import WEIGHTS_NAME
from loralloc.report.grid import RECORD_NAME, RankGrid, read_allocation
from loralloc.report.rounds import Moves, moves_of
from loralloc.runs import folder as names
from loralloc.training.seal import CHECKPOINTS

HELD_OUT = {"loss": 1, "accuracy": 100, "perplexity": 1}
"""What is measured on held-out rows without a task, and what it is shown in units of."""

LONGEST = 60
"""Characters of a name that are shown."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One point of the frontier of an adapter that shrank."""

    parameters: int
    loss: float
    """Mean held-out loss."""

    kept: bool
    """Whether the adapter was pruned to this size, or only tried at it."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What one run folder holds."""

    name: str
    """What tells it from the other runs of the report."""

    settings: Mapping[str, Any]
    """Every setting's value."""

    log: Sequence[Mapping[str, float]]
    """Every log entry's finite numbers, in order; each has a "step"."""

    figures: Mapping[str, float]
    """What was measured after training, by name, from 0 to 100 or as losses."""

    parameters: int | None
    """Parameters that the folder stores; None where the run has not been finished."""

    allocation: Mapping[str, Any] | None
    """The content of `allocation.json`, whose ranks are checked; None where no ranks moved."""

    moves: Moves | None
    """What its rounds did; None likewise."""

    frontier: Sequence[Size]
    """Sizes that the adapter passed while it shrank; mostly none."""

    def setting(self, *options: str) -> Any:
        """The first of these settings that has a value; None where none has."""
        return next((v for v in map(self.settings.get, options) if v is not None), None)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """The steps at which something was logged, and its values."""
        points = {entry["step"]: entry[name] for entry in self.log if name in entry}
        return list(points), list(points.values())

    def grid(self, shown_round: int | None = None, *, scored: bool = False) -> RankGrid:
        """Its ranks by layer and kind; only where it has an allocation."""
        assert self.allocation is not None, "asked only of a run that moved ranks"
        return RankGrid.from_allocation(self.allocation, shown_round=shown_round, scored=scored)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders among some folders and below them, in order, each once.

    Raises:
        ValueError: A folder is none, or holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder; give run folders, or a folder that holds some."
            )
        runs = [folder] if names.holds_run(folder) else _below(folder)
        if not runs:
            raise ValueError(
                f"{folder} holds no run; give the output folder of `loralloc train`, or a folder "
                "that holds some."
            )
        found.update((run.resolve(), run) for run in runs)
    return list(found.values())


def read_run(folder: Path, *, name: str) -> TrainedRun:
    """Read a run folder.

    Args:
        folder: The run's.
        name: What to call it.

    Raises:
        ValueError: A file of it is not what a run writes; one sentence with its name.
    """
    allocation = moves = None
    if (folder / RECORD_NAME).is_file():
        allocation = read_allocation(folder)
        RankGrid.from_allocation(allocation)
        moves = moves_of(allocation)
    return TrainedRun(
        name=name,
        settings=_settings(folder),
        log=_log(folder / names.METRICS),
        figures=_figures(folder),
        parameters=_parameters(folder / WEIGHTS_NAME),
        allocation=allocation,
        moves=moves,
        frontier=_frontier(allocation or {}),
    )


def read_runs(folders: Iterable[Path]) -> list[TrainedRun]:
    """Read run folders and those below them, each under the shortest name that tells it apart.

    Raises:
        ValueError: See `find_runs` and `read_run`.
    """
    paths = find_runs(folders)
    parts = [path.resolve().parts[1:] or ("run",) for path in paths]
    length = next(
        n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)
    )
    whole = ["/".join(part[-length:]) for part in parts]
    cut = [shown(name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}") for name in whole]
    told = Counter(cut)
    return [
        read_run(path, name=name if told[name] == 1 else f"{number}: {name}")
        for number, (path, name) in enumerate(zip(paths, cut, strict=True), start=1)
    ]


def shown(text: object, *, longest: int = LONGEST) -> str:
    """A string from a folder as it may be printed: on one line, no longer than that."""
    words = " ".join(str(text).split())
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"


def finite(value: object) -> float | None:
    """A number that is one; None for anything else."""
    return float(cast(float, value)) if is_number(value) else None


def _below(folder: Path) -> list[Path]:
    """Run folders below a folder; a checkpoint is part of its run."""
    runs = []
    is_sweep = (folder / TABLE).is_file()
    for child in sorted(folder.iterdir()):
        if is_sweep and child.name == BEST:
            continue  # a copy of one of its cells
        if child.is_dir() and not child.is_symlink() and not child.match(CHECKPOINTS):
            runs += [child] if names.holds_run(child) else _below(child)
    return runs


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / names.SETTINGS).is_file():
        return {}
    data = read_json(folder / names.SETTINGS)
    return {
        str(name): entry["value"]
        for name, entry in data.items()
        if isinstance(entry, dict) and "value" in entry
    }


def _log(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    entries, text = [], path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
    for line in whole.split("\n")[:-1]:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds a line that is not JSON; restore the file.") from error
        if not isinstance(data, dict) or finite(data.get("step")) is None:
            raise ValueError(f"{path} holds a line without a step; restore the file.")
        numbers = {str(name): finite(value) for name, value in data.items()}
        entries.append({name: value for name, value in numbers.items() if value is not None})
    return entries


def _figures(folder: Path) -> dict[str, float]:
    """Figures of every evaluation in the folder, and of the demo."""
    figures: dict[str, float] = {}
    for path in sorted(folder.glob(f"{names.EVALUATIONS}/*/{EVAL_NAME}")):
        data = read_json(path)
        name = path.parent.name + _of_first(data)
        for entry in data.get("figures") or []:
            if isinstance(entry, dict) and (value := finite(entry.get("value"))) is not None:
                figures[shown(f"{name} {entry.get('name')}")] = value
        for measure, unit in HELD_OUT.items():  # of a run without a task
            if (value := finite(data.get(measure))) is not None:
                figures[shown(f"{name} {measure}")] = unit * value
    if (folder / names.DEMO).is_file():
        after = read_json(folder / names.DEMO).get("after")
        after = after if isinstance(after, dict) else {}
        bleu = after.get("test_bleu")
        for name, value in (
            ("test loss", after.get("test_loss")),
            ("test BLEU", bleu.get("value") if isinstance(bleu, dict) else None),
        ):
            if (number := finite(value)) is not None:
                figures[name] = number
    return figures


def _of_first(data: Mapping[str, Any]) -> str:
    """Of how many examples an evaluation is that has not seen all."""
    seen, there = finite(data.get("num_examples")), finite(data.get("num_in_split"))
    return f" (first {seen:.0f})" if seen and there and seen < there else ""


def _parameters(path: Path) -> int | None:
    """Numbers in a file of safetensors, from its header alone."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(map(int, shape)) for shape in shapes)
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        *(OverflowError, RecursionError, struct.error),
    ) as error:
        raise ValueError(f"{path} is not a file of safetensors ({error}); restore it.") from error


def _frontier(data: Mapping[str, Any]) -> list[Size]:
    sizes = []
    entries = data.get("frontier") or []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        parameters, loss = finite(entry.get("parameters")), finite(entry.get("loss"))
        if parameters is not None and loss is not None:
            kept = entry.get("kept") is not False
            sizes.append(Size(parameters=int(parameters), loss=loss, kept=kept))
    return sizes
