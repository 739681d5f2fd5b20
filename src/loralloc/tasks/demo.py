"""The demo task: facts about invented restaurants to sentences. Needs no file and no network."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, Metric, RowError, text_field


class Demo:
    """The embedded set of `demo_grammar`.

    Rows have `prompt`, `completion` and, for evaluation, `references`: every phrasing of the
    same facts. A row without references is measured against its own completion.
    """

    name = "demo"
    hub_name: str | None = None
    hub_config: str | None = None
    licence = "Apache-2.0"
    metrics: tuple[Metric, ...] = ("bleu",)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("prompt", "completion")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        response = text_field(row, "completion")
        references = row.get("references") or [response]
        if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
            raise RowError("references", f"must be a list of texts and is {references!r:.60}")
        return Example(
            prompt=text_field(row, "prompt"), response=response, references=tuple(references)
        )


DEMO = Demo()
