"""What happened in each round, as data; `allocation.json` is this and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loralloc.allocation.files import read_json, write_text
from loralloc.allocation.recorded import check_record

FILE_NAME = "allocation.json"
VERSION = 1

HIGH_CHURN = 0.5
"""Share of the new ranks that go in the next round from which on a run says what that means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round: what was measured, planned and changed."""

    round: int
    """Number of the round, from 1."""

    step: int
    """Optimiser steps taken before it."""

    epoch: float
    """Epochs of training before it."""

    score: str
    """Name of the importance score; of the user's own, "package.module:name"."""

    s_full: float | None
    """S(M), minus the mean cross-entropy of the model on the scoring batch; None where the score
    is gathered while training, and no such batch is read."""

    s_base: float | None
    """S(M_0), the same with all ranks switched off; None likewise."""

    terms: Mapping[str, Mapping[str, list[float]]]
    """What the score adds up, by name, module and rank. Of eq. 6: "without", S(M) - S(M without
    rank r), and "only", S(M with only rank r) - S(M_0). Of "sensitivity": s of the "gate", and its
    mean over the "row" of A and the "column" of B. Of "architecture": the "gate"."""

    verified: Mapping[str, list[int]]
    """Ranks whose terms are exact where the score is "screened" or "ablation"."""

    settled: bool
    """Whether ablation settled which ranks to prune; False for first-order scores alone."""

    pruned: Mapping[str, list[int]]
    """Indices of the ranks that went, by module."""

    added: Mapping[str, int]
    """New ranks, by module, where there are any."""

    ranks_before: Mapping[str, int]
    """Rank of every module before the round."""

    ranks_after: Mapping[str, int]
    """Rank of every module after the round."""

    churn: float | None
    """Share of the ranks given in the round before that this round pruned; None in the first."""

    lost: int
    """Units of the budget that no module could receive."""

    spare: int
    """Units of the budget left for the next round."""

    seconds: float
    """Wall-clock time of scoring, planning and resizing."""

    worth: Mapping[str, list[float]] = field(default_factory=dict)
    """What the next ranks of each module were worth, where the policy read it."""

    def values(self) -> dict[str, list[float]]:
        """Each term of the score by name: the values of all ranks, module after module."""
        return {
            term: [value for values in by_module.values() for value in values]
            for term, by_module in self.terms.items()
        }


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of an adapter that shrinks, and how it did on held-out examples."""

    step: int
    """Optimiser steps taken when it was judged."""

    parameters: int
    """LoRA parameters."""

    ranks: int
    """Ranks of all modules together."""

    modules: int
    """Modules that have any; the others are as they were before there was an adapter."""

    loss: float
    """Mean held-out loss a target."""

    worse_by: float
    """What pruning to it cost at once, example by example, from the loss just before."""

    standard_error: float
    """Of that difference; 0 for the first size and at the end, where nothing is compared."""

    kept: bool
    """Whether it was as good as it had to be; else no rank went."""


@dataclass(kw_only=True)
class Record:
    """The rounds of a run, with what they started from."""

    config: Mapping[str, Any]
    """The `AllocationConfig` as data; a score or policy of the user's own by its name."""

    initial_ranks: Mapping[str, int]
    """Rank of every adapted module before the first round, in model order."""

    round_steps: list[int] | None = None
    """Optimiser steps after which rounds were to take place; None where there was no schedule."""

    note: str = ""
    """What of the schedule is otherwise than `config` says, and why; empty where nothing is."""

    rounds: list[Round] = field(default_factory=list)
    """The rounds so far, without one that was taken back."""

    frontier: list[Size] = field(default_factory=list)
    """The sizes that a shrinking adapter passed, in order; empty where ranks are allocated."""

    def __post_init__(self) -> None:
        """Begin to count births: a round of a long run goes on from the one before."""
        self._counted: tuple[Round | None, dict[str, list[int]]] = None, {}

    @property
    def last_ranks(self) -> Mapping[str, int]:
        """As `ranks`, the same object every time: a long run holds it once."""
        return self.rounds[-1].ranks_after if self.rounds else self.initial_ranks

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module now; 0 for a module that left the adapter."""
        return dict(self.last_ranks)

    @property
    def spare(self) -> int:
        """Units of the budget that the last round left over."""
        return self.rounds[-1].spare if self.rounds else 0

    def births(self) -> dict[str, list[int]]:
        """The round in which each rank was given, 0 for the first ones, by module."""
        last, births = self._counted
        at = 0 if last is None else last.round
        if last is not None and (len(self.rounds) < at or self.rounds[at - 1] is not last):
            at = 0  # it was taken back
        if not at:
            births = {name: [0] * rank for name, rank in self.initial_ranks.items()}
        for entry in self.rounds[at:]:
            for name, gone in entry.pruned.items():
                went = set(gone)
                births[name] = [b for i, b in enumerate(births[name]) if i not in went]
            for name, count in entry.added.items():
                births[name] += [entry.round] * count
        self._counted = (self.rounds[-1] if self.rounds else None), births
        return {name: list(of) for name, of in births.items()}

    def young(self, step: int) -> dict[str, frozenset[int]]:
        """Ranks that have trained for fewer steps than the first had at the first round, by module.

        Args:
            step: Optimiser steps taken by now.
        """
        begun = [0, *(entry.step for entry in self.rounds)]
        enough = begun[min(1, len(self.rounds))]
        return {
            name: frozenset(i for i, b in enumerate(of) if b and step - begun[b] < enough)
            for name, of in self.births().items()
        }

    @property
    def churn_note(self) -> str:
        """What it means that most new ranks were pruned at once; empty where they were not."""
        pairs = list(zip(self.rounds, self.rounds[1:], strict=False))
        given = [sum(before.added.values()) for before, _ in pairs]
        gone = sum(n * (entry.churn or 0.0) for n, (_, entry) in zip(given, pairs, strict=True))
        if gone <= HIGH_CHURN * sum(given):
            return ""
        cure = (
            'let it train first with `newborns="protected"` or "potential"'
            if self.config.get("newborns", "compete") == "compete"
            else "move fewer ranks a round, or place the rounds further apart"
        )
        return (
            f"{gone / sum(given):.0%} of the ranks that rounds gave were pruned in the round after "
            "(churn), so the same few ranks were moved about and the modules that received them "
            "gained nothing: a new rank begins with zeros in B and scores lowest until it has "
            f"trained; {cure}"
        )

    def churn(self, pruned: Mapping[str, Sequence[int]]) -> float | None:
        """Share of the ranks given in the last round that a next one prunes; None without any.

        Args:
            pruned: Indices of the ranks that are to go, by module.
        """
        last, births = len(self.rounds), self.births()
        young = sum(born == last for of in births.values() for born in of)
        if not last or not young:
            return None
        return sum(births[name][i] == last for name, gone in pruned.items() for i in gone) / young

    def as_data(self) -> dict[str, Any]:
        """What `allocation.json` holds."""
        rounds, frontier = (list(map(_shallow, of)) for of in (self.rounds, self.frontier))
        return {"version": VERSION, **_shallow(self), "rounds": rounds, "frontier": frontier}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Record:
        """What `as_data` gave.

        Raises:
            ValueError: It is of another version; or another error where it is no record at all.
        """
        values = dict(data)
        if values.pop("version") != VERSION:
            raise ValueError("another version")
        check_record(values)
        entries = values.pop("rounds")
        values["frontier"] = [Size(**entry) for entry in values.get("frontier", ())]
        record = cls(**values)
        for entry in entries:
            record.rounds.append(Round(**{**entry, "ranks_before": record.last_ranks}))
        return record

    def save(self, folder: str | Path) -> None:
        """Write `allocation.json` into a folder."""
        write_text(Path(folder) / FILE_NAME, json.dumps(self.as_data()) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Record:
        """Read `allocation.json` from a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not a record of this version.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {FILE_NAME}; name the folder of a run or a checkpoint of one."
            )
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a file like `allocation.json`.

        Raises:
            ValueError: It is not a record of this version.
        """
        try:
            return cls.from_data(read_json(path))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a record of rounds in version {VERSION} ({error}); "
                "take the file from the run again."
            ) from error


def _shallow(item: Record | Round | Size) -> dict[str, Any]:
    """A dataclass as a dict whose values are its own: a record is written often, and is long."""
    return {of.name: getattr(item, of.name) for of in fields(item)}
