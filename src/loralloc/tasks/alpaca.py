"""Alpaca: an instruction, perhaps an input, and an output."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, HubRule, Metric, text_field

ALPACA_COLUMNS = ("instruction", "output")


def alpaca_example(row: Mapping[str, object]) -> Example:
    """Turn a row with `instruction`, `output` and, where there is one, `input` into an example.

    The prompt names its parts, so that a model without a chat template can tell them apart:
    "Instruction:", "Input:" (left out where the row has none) and "Response:".

    Raises:
        RowError: If the instruction or the output is missing or empty.
    """
    prompt = f"Instruction:\n{text_field(row, 'instruction')}\n\n"
    if str(row.get("input") or "").strip():
        prompt += f"Input:\n{text_field(row, 'input')}\n\n"
    return Example(prompt=prompt + "Response:", response=text_field(row, "output"))


class Alpaca:
    """Alpaca's instructions in the cleaned version; the paper only trains on them.

    Rows have `instruction`, `output` and, perhaps empty, `input`.
    """

    name = "alpaca"
    hub_name: str | None = "yahma/alpaca-cleaned"
    hub_config: str | None = None
    hub_rule: HubRule = "official"
    official_sizes: Mapping[str, int] = {"train": 51_760}
    licence = "CC BY-NC 4.0"
    metrics: tuple[Metric, ...] = ()
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ALPACA_COLUMNS

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        return alpaca_example(row)


ALPACA = Alpaca()
