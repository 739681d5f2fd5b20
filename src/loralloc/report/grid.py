"""The ranks of a run as layers by module kinds, read from its `allocation.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralloc.allocation.files import read_json
from loralloc.allocation.module_names import short_labels, split_name
from loralloc.allocation.recorded import checked_ranks

RECORD_NAME = "allocation.json"
RECORD_VERSION = 1


class RankChange(NamedTuple):
    """Ranks at the start of the run and at the round that is shown."""

    start: int
    now: int

    @property
    def change(self) -> int:
        """Ranks gained (positive) or lost (negative) since the start."""
        return self.now - self.start


def total(cells: Iterable[RankChange | None]) -> RankChange:
    """The sum of some cells; None stands for a module that a layer does not have."""
    present = [cell for cell in cells if cell is not None]
    return RankChange(sum(cell.start for cell in present), sum(cell.now for cell in present))


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Ranks by layer and module kind, at the start and after one round."""

    layers: tuple[int, ...]
    """Layer indices, ascending."""

    kinds: tuple[str, ...]
    """Short distinct labels in model order: "q_proj", "attention.output.dense", "decoder q"."""

    cells: Mapping[tuple[int, str], RankChange]
    """(layer, kind) -> ranks. A module that a layer does not have is absent."""

    others: Mapping[str, RankChange]
    """Adapted modules outside the layers, by full name."""

    shown_round: int
    """The round whose outcome is shown; 0 is the start."""

    num_rounds: int
    """Rounds that the run holds."""

    num_new: int = 0
    """Ranks left out because the shown round gave them, so that no round has scored them yet."""

    @classmethod
    def from_allocation(
        cls, data: Mapping[str, Any], *, shown_round: int | None = None, scored: bool = False
    ) -> RankGrid:
        """The grid of one run.

        Args:
            data: The content of `allocation.json`.
            shown_round: Show the ranks after this round; 0 is the start, None the last round.
            scored: Leave out the ranks that this round gave: no round has scored them yet.

        Raises:
            ValueError: `data` is not an allocation record, or holds no such round.
        """
        start = _ranks_of(data, "initial_ranks", where="the record")
        states = [start]
        for number, entry in enumerate(_rounds_of(data), start=1):
            if entry.get("round") != number:
                raise _unreadable(f"round {number} is numbered {entry.get('round')!r:.60}")
            states.append(_ranks_of(entry, "ranks_after", where=f"round {number}"))
            if states[number].keys() != start.keys():
                raise _unreadable(f"round {number} names other modules than `initial_ranks`")
        last = len(states) - 1
        shown = last if shown_round is None else shown_round
        if not 0 <= shown <= last:
            raise ValueError(
                f"Round {shown} was asked for, but the run holds {last} rounds; "
                f"give a number from 0 (the start) to {last}."
            )
        new = _new_in(data["rounds"][shown - 1]) if scored and shown else {}
        cells = {
            name: RankChange(rank, states[shown][name] - new.get(name, 0))
            for name, rank in start.items()
        }
        return _arrange(cells, shown_round=shown, num_rounds=last, num_new=sum(new.values()))

    @property
    def total(self) -> RankChange:
        """Ranks of the whole model."""
        return total(self.modules)

    @property
    def modules(self) -> tuple[RankChange, ...]:
        """The ranks of every adapted module, those outside the layers last."""
        return (*self.cells.values(), *self.others.values())

    @property
    def common_start(self) -> int | None:
        """The rank that every module started with, or None where they differ."""
        starts = {cell.start for cell in self.modules}
        return starts.pop() if len(starts) == 1 else None


def read_allocation(run: Path) -> dict[str, Any]:
    """The content of a run folder's `allocation.json`.

    Raises:
        ValueError: There is no such folder, it holds no such file, or the file is not JSON.
    """
    if not run.is_dir():
        raise ValueError(
            f"{run} is not a folder; give the output folder of a `loralloc train` run, "
            f"the one that holds {RECORD_NAME}."
        )
    path = run / RECORD_NAME
    if not path.is_file():
        below = [str(found.parent) for found in sorted(run.glob(f"*/{RECORD_NAME}"))]
        hint = f"did you mean {' or '.join(below[:3])}?" if below else "give a run's output folder."
        raise ValueError(f"{run} holds no {RECORD_NAME}, so there are no ranks to show; {hint}")
    data = read_json(path)
    if data.get("version") != RECORD_VERSION:
        raise ValueError(
            f"{path} has version {data.get('version')!r:.60}, but this loralloc reads version "
            f"{RECORD_VERSION}; use the loralloc that wrote the run."
        )
    return data


def _arrange(
    cells: Mapping[str, RankChange], *, shown_round: int, num_rounds: int, num_new: int
) -> RankGrid:
    """Puts modules given by name into layers and kinds."""
    places = {name: split_name(name) for name in cells}
    kinds_of: dict[str, list[str]] = {}  # stack -> its kinds, both in model order
    for place in places.values():
        if place is not None:
            stack, _, kind = place
            kinds = kinds_of.setdefault(stack, [])
            if kind not in kinds:
                kinds.append(kind)
    label_of = {
        (stack, kind): prefix + label
        for stack, prefix in zip(kinds_of, _stack_prefixes(list(kinds_of)), strict=True)
        for kind, label in short_labels(kinds_of[stack]).items()
    }
    placed = {
        (place[1], label_of[place[0], place[2]]): cells[name]
        for name, place in places.items()
        if place is not None
    }
    return RankGrid(
        layers=tuple(sorted({layer for layer, _ in placed})),
        kinds=tuple(label_of.values()),
        cells=placed,
        others={name: cells[name] for name, place in places.items() if place is None},
        shown_round=shown_round,
        num_rounds=num_rounds,
        num_new=num_new,
    )


def _stack_prefixes(stacks: Sequence[str]) -> list[str]:
    """What tells several stacks of layers apart ("encoder ", "decoder "); "" for a single one.

    The space ends it because no module's name holds one: prefixed labels stay distinct.
    """
    names = [stack.split(".") for stack in stacks]
    shared = set.intersection(*map(set, names)) if names else set()
    own = [".".join(part for part in name if part not in shared) for name in names]
    if len(set(own)) < len(own):
        own = list(stacks)
    return [f"{part} " if part else "" for part in own]


def _rounds_of(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rounds = data.get("rounds")
    if not isinstance(rounds, list) or not all(isinstance(entry, dict) for entry in rounds):
        raise _unreadable("`rounds` is not a list of objects")
    return rounds


def _ranks_of(entry: Mapping[str, Any], key: str, *, where: str) -> dict[str, int]:
    ranks = entry.get(key)
    if not isinstance(ranks, dict) or not ranks:
        raise _unreadable(f"{where} holds no `{key}`")
    return _checked(ranks, f"`{key}` of {where}")


def _checked(ranks: Any, where: str) -> dict[str, int]:
    try:
        return dict(checked_ranks(ranks, where))
    except ValueError as error:
        raise _unreadable(str(error)) from None


def _new_in(entry: Mapping[str, Any]) -> dict[str, int]:
    """Ranks that a round gave, by module."""
    where = f"round {entry.get('round')}"
    if not isinstance(entry.get("added"), dict):
        raise _unreadable(f"{where} holds no `added`")
    return _checked(entry["added"], f"`added` of {where}")


def _unreadable(reason: str) -> ValueError:
    return ValueError(
        f"{RECORD_NAME} is not a record of a run: {reason}; restore the file or train again."
    )
