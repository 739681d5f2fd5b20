"""SQuAD: a question about a paragraph, answered by a stretch of it."""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.reading import Place, find, reading_example
from loralloc.tasks.task import Example, HubRule, Metric, RowError, text_field, texts_field


class Squad:
    """The Stanford question answering data set, version 1.1.

    Rows have `context`, `question` and `answers`: {"text": [...], "answer_start": [...]}, one
    answer in train and several in the official development set.

    The paper prints 5.9k test rows; its rule makes the official development set the test set,
    which is 10,570.
    """

    name = "squad"
    hub_name: str | None = "rajpurkar/squad"
    hub_config: str | None = None
    hub_rule: HubRule = "train_1000"
    official_sizes: Mapping[str, int] = {"train": 87_599, "validation": 10_570}
    licence = "CC BY-SA 4.0"
    metrics: tuple[Metric, ...] = ("f1-em",)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("context", "question", "answers")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        text_field(row, "context")
        context = str(row["context"])  # whole: positions count from its first character
        answers, starts = _answers(row)
        return reading_example(
            context=context,
            question=text_field(row, "question"),
            answers=answers,
            places=[_place(context, *answer) for answer in zip(answers, starts, strict=True)],
        )


def _answers(row: Mapping[str, object]) -> tuple[tuple[str, ...], list[int]]:
    value = row.get("answers")
    if value is None:
        raise RowError("answers", "is missing")
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
        raise RowError("answers", f"must hold `text` and `answer_start` and is {value!r:.60}")
    starts = value["answer_start"]
    try:
        texts = texts_field(value, "text")
    except RowError as error:
        raise RowError("answers.text", error.message) from error
    if not isinstance(starts, list) or not all(type(start) is int for start in starts):
        raise RowError("answers.answer_start", f"must list whole numbers and is {starts!r:.60}")
    if len(starts) != len(texts):
        raise RowError(
            "answers.answer_start", f"has {len(starts)} positions for {len(texts)} answers"
        )
    return texts, starts


def _place(context: str, answer: str, start: int) -> Place:
    """Return where the answer is; the nearest place to the start that the row gives."""
    if start >= 0 and context.startswith(answer, start):
        return answer, start
    places = find(context, answer)
    if not places:
        raise RowError("answers.text", f"has {answer!r:.60}, which is not in the context")
    return min(places, key=lambda place: abs(place[1] - start))


SQUAD = Squad()
