"""RTE: does a sentence follow from a text?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.entailment import ENTAILMENT_LABELS, entailment_example
from loralloc.tasks.task import Example, HubRule, Metric


class Rte:
    """Recognising textual entailment, as GLUE has it.

    Rows have `sentence1`, `sentence2` and `label` (0 entailment, 1 not entailment).
    """

    name = "rte"
    hub_name: str | None = "nyu-mll/glue"
    hub_config: str | None = "rte"
    hub_rule: HubRule = "halve_validation"
    official_sizes: Mapping[str, int] = {"train": 2_490, "validation": 277}
    licence = "none (research use)"
    metrics: tuple[Metric, ...] = ("accuracy",)
    labels: tuple[str, ...] = ENTAILMENT_LABELS
    columns: tuple[str, ...] = ("sentence1", "sentence2", "label")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        return entailment_example(row, "sentence1", "sentence2")


RTE = Rte()
