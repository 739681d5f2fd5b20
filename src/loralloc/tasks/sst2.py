"""SST-2: is a phrase of a film review positive or negative?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, HubRule, Metric, label_field, text_field


class Sst2:
    """The Stanford Sentiment Treebank with two labels, as GLUE has it.

    Rows have `sentence` (its closing blank is dropped) and `label` (0 negative, 1 positive).
    """

    name = "sst2"
    hub_name: str | None = "nyu-mll/glue"
    hub_config: str | None = "sst2"
    hub_rule: HubRule = "train_1000"
    official_sizes: Mapping[str, int] = {"train": 67_349, "validation": 872}
    licence = "none (research use)"
    metrics: tuple[Metric, ...] = ("accuracy",)
    labels: tuple[str, ...] = ("negative", "positive")
    columns: tuple[str, ...] = ("sentence", "label")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        sentence = text_field(row, "sentence")
        label = label_field(row, "label", labels=self.labels)
        return Example(
            prompt=f"{sentence}\nThe sentiment of the given sentence is:",
            response=self.labels[label],
            label=label,
            text=sentence,
        )


SST2 = Sst2()
