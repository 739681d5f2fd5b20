"""Metrics by kept libraries, each figure with the implementation's name and version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value and what computed it."""

    name: str
    """The metric."""

    value: float
    """Its value, in the metric's own unit (BLEU: 0 to 100)."""

    implementation: str
    """Library, version and settings."""


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Corpus BLEU against all references of each prediction (Post 2018, sacrebleu).

    Args:
        predictions: One text an example.
        references: The texts each is measured against, at least one an example; their number may
            differ.

    Raises:
        ValueError: An example has no reference, or the two lengths differ.
    """
    from sacrebleu.metrics import BLEU

    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions and references for {len(references)}; "
            "give references for every prediction."
        )
    if not predictions:
        raise ValueError("There are no predictions, so BLEU is not defined; give at least one.")
    bare = [i for i, texts in enumerate(references) if not texts]
    if bare:
        raise ValueError(f"Example {bare[0] + 1} has no reference; BLEU needs at least one each.")
    metric = BLEU()
    most = max(len(texts) for texts in references)
    # sacrebleu wants one list a reference number; None stands for "this example has fewer".
    streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    score = metric.corpus_score(list(predictions), streams)
    return Figure(name="BLEU", value=score.score, implementation=str(metric.get_signature()))
