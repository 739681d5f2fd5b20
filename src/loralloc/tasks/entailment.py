"""The prompt of the tasks about two texts: does one follow from the other?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, label_field, text_field

ENTAILMENT_LABELS = ("entailment", "not entailment")
"""Responses by label; GLUE spells the second with an underscore."""


def entailment_example(row: Mapping[str, object], first: str, second: str) -> Example:
    """Turn a row into an example; `first` and `second` name the fields of its texts.

    The paper prints the first text twice in this prompt; the second is meant (Appendix C).

    Raises:
        RowError: If a text or the label breaks the contract.
    """
    text, pair = text_field(row, first), text_field(row, second)
    label = label_field(row, "label", labels=ENTAILMENT_LABELS)
    return Example(
        prompt=(
            f"sentence 1: {text}\nsentence 2: {pair}\n"
            "Are sentence 1 and sentence 2 have entailment relation or not?"
        ),
        response=ENTAILMENT_LABELS[label],
        label=label,
        text=text,
        text_pair=pair,
    )
