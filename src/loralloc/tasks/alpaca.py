"""Alpaca columns: an instruction, perhaps an input, and an output."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.task import Example, text_field

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
