"""E2E: from the attributes of a restaurant to a sentence about it."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, HubRule, Metric, text_field


class E2e:
    """The E2E NLG challenge.

    Rows have `meaning_representation` and `human_reference`, one sentence a row. Several rows
    share a meaning representation; `columns.merge_references` brings their sentences together.
    """

    name = "e2e"
    hub_name: str | None = "tuetschek/e2e_nlg"
    hub_config: str | None = None
    hub_rule: HubRule = "official"
    official_sizes: Mapping[str, int] = {"train": 42_061, "validation": 4_672, "test": 4_693}
    licence = "CC BY-SA 4.0"
    metrics: tuple[Metric, ...] = ("bleu", "rouge-l", "meteor")
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("meaning_representation", "human_reference")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        meaning = text_field(row, "meaning_representation")
        sentence = text_field(row, "human_reference")
        return Example(
            prompt=(
                f"Reference:\n{meaning}\nGenerate a customer review following the given reference."
            ),
            response=sentence,
            references=(sentence,),
        )


E2E = E2e()
