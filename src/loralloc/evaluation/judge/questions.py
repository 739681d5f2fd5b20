"""Questions of several turns, and files of answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.tasks.columns import row_error
from loralloc.tasks.mt_bench import MT_BENCH
from loralloc.tasks.source import SUFFIXES, load_splits, read_table
from loralloc.tasks.task import RowError

GPT4_ANSWERS_NAME = "gpt4_answers.jsonl"
"""The file beside the questions that holds GPT-4's answers."""

Answers = Mapping[int, tuple[str, ...]]
"""The answers to the turns of each question, by its number."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of MT-Bench; the later turns build on the answers to the earlier ones."""

    number: int
    """The `question_id`."""

    turns: tuple[str, ...]
    """What the user says, at least once."""

    category: str | None = None
    """The kind of question, where the file says."""


def load_questions(data: str, *, limit: int | None = None) -> list[Question]:
    """Read the test split of a folder, a file or a Hub data set in the form of MT-Bench.

    Args:
        data: A folder with `test.jsonl`, or what else `load_splits` takes.
        limit: Most questions, the first ones; None for all.

    Raises:
        ValueError: If a row has no number or no turns, two have one number, or there is nothing
            to read.
    """
    splits = load_splits(data, split_names=None if Path(data).is_file() else {"test": "test"})
    (split,) = splits.values()
    questions: dict[int, Question] = {}
    for row_number, row in enumerate(split.dataset, start=1):
        try:
            number, turns = _number(row), MT_BENCH.example(row).turns
            if number in questions:
                raise RowError("question_id", f"is {number}, as in an earlier row")
        except RowError as error:
            raise row_error(split, row_number, error) from error
        category = row.get("category")
        questions[number] = Question(
            number=number, turns=turns, category=None if category is None else str(category)
        )
    return list(questions.values())[:limit]


def read_answers(path: Path) -> Answers:
    """Read ready answers: rows with `question_id` and `turns`, or FastChat's with `choices`.

    Raises:
        ValueError: If the file is missing or cannot be read, or a row breaks the form.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} cannot be read: its name ends in none of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path} with answers.")
    answers: dict[int, tuple[str, ...]] = {}
    for row_number, row in enumerate(read_table(path), start=1):
        try:
            number = _number(row)
            if number in answers:
                raise RowError("question_id", f"is {number}, as in an earlier row")
            answers[number] = _answers(row)
        except RowError as error:
            raise ValueError(f"Row {row_number} of {path}: {error}.") from error
    return answers


def check_answers(answers: Answers, questions: Sequence[Question], *, source: str) -> None:
    """Refuse answers that leave a turn of a question out.

    Raises:
        ValueError: If one is missing; the message names the source and the question.
    """
    for question in questions:
        given = len(answers.get(question.number, ()))
        if given != len(question.turns):
            raise ValueError(
                f"{source} has {given} answers to question {question.number}, which has "
                f"{len(question.turns)} turns; give an answer to every turn of every question, or "
                "ask fewer with `--limit`."
            )


def _number(row: Mapping[str, object]) -> int:
    value = row.get("question_id")
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowError("question_id", f"must be a whole number and is {value!r:.60}")
    return value


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The answers in a row; a model may well have said nothing."""
    value = row.get("turns")
    if value is None and row.get("choices"):
        value = row["choices"][0].get("turns")
    if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
        raise RowError("turns", f"must be a list of texts and is {value!r:.60}")
    return tuple(value)
