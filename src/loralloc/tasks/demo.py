"""The demo task: facts about invented restaurants to sentences. Needs no file and no network."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.demo_grammar import SIZES
from loralloc.tasks.task import Example, HubRule, Metric, text_field, texts_field


class Demo:
    """The embedded set of `demo_grammar`.

    Rows have `prompt`, `completion` and, for evaluation, `references`: every phrasing of the
    same facts. A row without references is measured against its own completion.
    """

    name = "demo"
    hub_name: str | None = None
    hub_config: str | None = None
    hub_rule: HubRule = "official"
    official_sizes: Mapping[str, int] = SIZES
    licence = "Apache-2.0"
    metrics: tuple[Metric, ...] = ("bleu",)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("prompt", "completion")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        response = text_field(row, "completion")
        references = texts_field(row, "references") if row.get("references") else (response,)
        return Example(prompt=text_field(row, "prompt"), response=response, references=references)


DEMO = Demo()
