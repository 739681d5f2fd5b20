"""MT-Bench: 80 conversations of two turns, whose answers a judge reviews."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loralloc.tasks.source import read_table
from loralloc.tasks.task import Example, HubRule, Metric, RowError, texts_field

GPT4_ANSWERS_NAME = "gpt4_answers.jsonl"


class MtBench:
    """The questions of MT-Bench, in the form of FastChat's `question.jsonl`.

    Rows have `turns`, what the user says in each turn, and perhaps `reference`, a right answer
    to each (questions on mathematics, reasoning and coding; empty where a turn has none). No
    answer is the only right one, so an example has no response: a judge reviews it, and ROUGE-L
    is measured against GPT-4's answers, which come in a file of their own (`gpt4_answers`).
    """

    name = "mt_bench"
    hub_name: str | None = None
    hub_config: str | None = None
    hub_rule: HubRule = "official"
    official_sizes: Mapping[str, int] = {"test": 80}
    licence = "Apache-2.0"
    metrics: tuple[Metric, ...] = ("judge", "rouge-l")
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("question_id", "turns")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        turns = texts_field(row, "turns")
        references = _references(row, num_turns=len(turns))
        return Example(prompt=turns[0], response="", turns=turns, turn_references=references)


def _references(row: Mapping[str, object], *, num_turns: int) -> tuple[str, ...]:
    value = row.get("reference") or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RowError("reference", f"must be a list of texts and is {value!r:.60}")
    if len(value) not in (0, num_turns):
        raise RowError("reference", f"has {len(value)} texts for {num_turns} turns")
    return tuple(value)


def gpt4_answers(folder: Path) -> dict[int, tuple[str, ...]]:
    """Read GPT-4's answer to each turn, by `question_id`; empty where the folder has none.

    Raises:
        ValueError: If the file is there and a row of it breaks the contract.
    """
    path = folder / GPT4_ANSWERS_NAME
    if not path.exists():
        return {}
    answers = {}
    for number, row in enumerate(read_table(path), start=1):
        try:
            if type(row.get("question_id")) is not int:
                raise RowError("question_id", f"must be a number and is {row.get('question_id')!r}")
            answers[row["question_id"]] = texts_field(row, "turns")
        except RowError as error:
            raise ValueError(f"Row {number} of {path}: {error}.") from error
    return answers


MT_BENCH = MtBench()
