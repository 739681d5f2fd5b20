"""COPA: which of two sentences is the cause, or the effect, of a premise?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, HubRule, Metric, RowError, label_field, text_field

QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}
"""What the field `question` stands for, in COPA's own words."""


class Copa:
    """Choice of plausible alternatives, as SuperGLUE has it.

    Rows have `premise`, `choice1`, `choice2`, `question` ("cause" or "effect") and `label`
    (0 for the first choice, 1 for the second).

    The paper puts one linear layer on an encoder for every classification task, so an encoder
    reads both choices at once: premise and question are its first text, the choices, numbered as
    in the prompt, its second.
    """

    name = "copa"
    hub_name: str | None = "aps/super_glue"
    hub_config: str | None = "copa"
    hub_rule: HubRule = "halve_validation"
    official_sizes: Mapping[str, int] = {"train": 400, "validation": 100}
    licence = "BSD 2-Clause"
    metrics: tuple[Metric, ...] = ("accuracy",)
    labels: tuple[str, ...] = ("1", "2")
    columns: tuple[str, ...] = ("premise", "choice1", "choice2", "question", "label")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        premise = text_field(row, "premise")
        first, second = text_field(row, "choice1"), text_field(row, "choice2")
        asked = text_field(row, "question")
        if asked not in QUESTIONS:
            raise RowError("question", f"must be {' or '.join(QUESTIONS)} and is {asked!r:.60}")
        question = QUESTIONS[asked]
        label = label_field(row, "label", labels=self.labels)
        return Example(
            prompt=(
                f"Premise:\n{premise}\nChoice 1: {first}\nChoice 2: {second}\nQuestion:\n{question}"
            ),
            response=self.labels[label],
            label=label,
            text=f"{premise} {question}",
            text_pair=f"Choice 1: {first} Choice 2: {second}",
        )


COPA = Copa()
