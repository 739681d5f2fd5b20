"""BoolQ: a question about a passage, answered by yes or no."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, HubRule, Metric, label_field, text_field


class BoolQ:
    """Yes/no questions as SuperGLUE has them.

    Rows have `question`, `passage` and `label` (0 no, 1 yes).
    """

    name = "boolq"
    hub_name: str | None = "aps/super_glue"
    hub_config: str | None = "boolq"
    hub_rule: HubRule = "halve_validation"
    official_sizes: Mapping[str, int] = {"train": 9_427, "validation": 3_270}
    licence = "CC BY-SA 3.0"
    metrics: tuple[Metric, ...] = ("accuracy",)
    labels: tuple[str, ...] = ("no", "yes")
    columns: tuple[str, ...] = ("question", "passage", "label")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        question, passage = text_field(row, "question"), text_field(row, "passage")
        label = label_field(row, "label", labels=self.labels)
        return Example(
            prompt=f"Reference document:\n{passage}\nQuestion:\n{question}",
            response=self.labels[label],
            label=label,
            text=question,
            text_pair=passage,
        )


BOOLQ = BoolQ()
