"""QNLI: does a sentence answer a question?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.entailment import ENTAILMENT_LABELS, entailment_example
from loralloc.tasks.task import Example, HubRule, Metric


class Qnli:
    """Questions of SQuAD with sentences that answer them or do not, as GLUE has them.

    Rows have `question`, `sentence` and `label` (0 entailment: it answers; 1 not entailment).
    """

    name = "qnli"
    hub_name: str | None = "nyu-mll/glue"
    hub_config: str | None = "qnli"
    hub_rule: HubRule = "train_1000"
    official_sizes: Mapping[str, int] = {"train": 104_743, "validation": 5_463}
    licence = "CC BY-SA 4.0"
    metrics: tuple[Metric, ...] = ("accuracy",)
    labels: tuple[str, ...] = ENTAILMENT_LABELS
    columns: tuple[str, ...] = ("question", "sentence", "label")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        return entailment_example(row, "question", "sentence")


QNLI = Qnli()
