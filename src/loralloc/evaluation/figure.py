"""A measured value, and what computed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value and what computed it."""

    name: str
    """What was measured, as a table heads it."""

    value: float | None
    """From 0 to 100; None where it could not be computed."""

    implementation: str
    """Library, version and settings."""

    missing: str | None = None
    """Why there is no value, in a sentence; None where there is one."""


def mean_figure(name: str, scores: Sequence[float], implementation: str) -> Figure:
    """Average the scores of the examples; there must be one."""
    return Figure(name=name, value=sum(scores) / len(scores), implementation=implementation)


def check_pairs(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: If there are no predictions, their number differs from that of the examples,
            or an example has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions and references for {len(references)}; "
            "give references for every prediction."
        )
    if not predictions:
        raise ValueError(f"There are no predictions, so {name} is not defined; give at least one.")
    bare = [number for number, texts in enumerate(references, start=1) if not texts]
    if bare:
        raise ValueError(f"Example {bare[0]} has no reference; {name} needs at least one each.")
