"""What the rounds of a run did, checked and counted, from `allocation.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from loralloc.allocation.files import is_number
from loralloc.allocation.module_names import kind_labels, split_name
from loralloc.allocation.recorded import checked_ranks
from loralloc.report.grid import RECORD_NAME

_NOT_WRITTEN = (
    *(KeyError, TypeError, ValueError),
    *(IndexError, AttributeError, OverflowError),
)
"""What reading a round comes upon that no run wrote."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What the modules of one kind or one layer gave and received, over all rounds."""

    gave: int
    stay: int
    """Ranks received that are still there after the last round."""

    gone: int
    """Ranks received that a later round pruned."""


@dataclass(frozen=True, kw_only=True)
class ScoredRound:
    """One round in numbers."""

    round: int
    step: int
    pruned: int
    given: int
    churn: float | None
    """Share of the ranks given in the round before that this one pruned."""

    seconds: float | None
    loss: float | None
    """Held-out loss that it measured; None where its score reads no examples."""

    kept_values: Mapping[str, Sequence[float]]
    """Of the ranks that stayed, the values of each term of the score."""

    pruned_values: Mapping[str, Sequence[float]]
    """Of the ranks that went, likewise."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """All rounds of a run."""

    rounds: Sequence[ScoredRound]
    by_kind: Mapping[str, Flow]
    """In model order."""

    by_layer: Mapping[int, Flow]

    @property
    def terms(self) -> list[str]:
        """Names of the terms of the score."""
        return list(self.rounds[0].kept_values) if self.rounds else []


def moves_of(data: Mapping[str, Any]) -> Moves:
    """What the rounds did.

    Args:
        data: The content of `allocation.json`, whose ranks have been checked.

    Raises:
        ValueError: A round is not as rounds are written.
    """
    start = checked_ranks(data["initial_ranks"], "`initial_ranks`")
    births = {name: [0] * rank for name, rank in start.items()}
    gave, received, gone = (dict.fromkeys(births, 0) for _ in range(3))
    rounds = []
    for number, entry in enumerate(data["rounds"], start=1):
        try:
            rounds.append(_scored(entry, births))
            for name, indices in entry["pruned"].items():
                gave[name] += len(indices)
                went = set(indices)
                gone[name] += sum(births[name][i] > 0 for i in went)
                births[name] = [b for i, b in enumerate(births[name]) if i not in went]
            for name, count in checked_ranks(entry["added"], "`added`").items():
                received[name] += count
                births[name] += [number] * count
            if {name: len(of) for name, of in births.items()} != entry["ranks_after"]:
                raise ValueError("what it pruned and gave is not what became of the ranks")
        except _NOT_WRITTEN as error:
            raise ValueError(
                f"Round {number} of {RECORD_NAME} is not as rounds are written ({error!s:.200}); "
                "restore the file or train again."
            ) from error
    labels = kind_labels(births)
    layers = {name: place[1] for name in births if (place := split_name(name))}

    def over(groups: Mapping[str, Any]) -> dict[Any, Flow]:
        members: dict[Any, list[str]] = {}
        for name, group in groups.items():
            members.setdefault(group, []).append(name)
        return {
            group: Flow(
                gave=sum(gave[n] for n in of),
                stay=sum(received[n] - gone[n] for n in of),
                gone=sum(gone[n] for n in of),
            )
            for group, of in members.items()
        }

    by_layer = over(layers)
    return Moves(
        rounds=rounds, by_kind=over(labels), by_layer={i: by_layer[i] for i in sorted(by_layer)}
    )


def _scored(entry: Mapping[str, Any], births: Mapping[str, Sequence[int]]) -> ScoredRound:
    pruned = {name: {int(i) for i in indices} for name, indices in entry["pruned"].items()}
    kept_values: dict[str, list[float]] = {}
    pruned_values: dict[str, list[float]] = {}
    for term, by_module in entry["terms"].items():
        kept_values[term], pruned_values[term] = [], []
        for name, values in by_module.items():
            if len(values) != len(births[name]):
                raise ValueError(f"{name} has {len(births[name])} ranks and {len(values)} scores")
            for index, value in enumerate(values):
                went = index in pruned.get(name, ())
                (pruned_values if went else kept_values)[term].append(_number(value))
    churn, seconds, s_full = (entry.get(key) for key in ("churn", "seconds", "s_full"))
    return ScoredRound(
        round=int(entry["round"]),
        step=int(entry["step"]),
        pruned=sum(map(len, pruned.values())),
        given=sum(map(int, entry["added"].values())),
        churn=None if churn is None else _number(churn),
        seconds=None if seconds is None else _number(seconds),
        loss=None if s_full is None else -_number(s_full),
        kept_values=kept_values,
        pruned_values=pruned_values,
    )


def _number(value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r:.60} is no number")
    return float(cast(float, value))
