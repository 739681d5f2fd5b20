"""ReCoRD: which entity of a news text does the placeholder in a statement stand for?"""

from __future__ import annotations

from collections.abc import Mapping

from loralloc.tasks.reading import Place, find, reading_example
from loralloc.tasks.task import Example, HubRule, Metric, RowError, text_field, texts_field


class ReCoRD:
    """Reading comprehension with commonsense reasoning, as SuperGLUE has it.

    Rows have `passage` (its summary points behind "@highlight" marks), `query` (with a
    "@placeholder"), `answers` (texts, any of them right) and `entity_spans`:
    {"text": [...], "start": [...], "end": [...]}, the entities in the passage.

    The paper prints 101k / 1k / 7.4k rows; its rule gives 99,730 / 1,000 / 10,000 (100,730 are
    the official train set before 1,000 leave it).
    """

    name = "record"
    hub_name: str | None = "aps/super_glue"
    hub_config: str | None = "record"
    hub_rule: HubRule = "train_1000"
    official_sizes: Mapping[str, int] = {"train": 100_730, "validation": 10_000}
    licence = "Apache-2.0 in part"
    metrics: tuple[Metric, ...] = ("f1-em",)
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("passage", "query", "answers", "entity_spans")

    def example(self, row: Mapping[str, object]) -> Example:
        """See `Task.example`."""
        text_field(row, "passage")
        passage = str(row["passage"])  # whole: positions count from its first character
        answers = texts_field(row, "answers")
        entities = _entities(row)
        return reading_example(
            context=passage,
            question=text_field(row, "query"),
            answers=answers,
            places=[p for answer in answers for p in _places(passage, answer, entities)],
        )


def _entities(row: Mapping[str, object]) -> list[Place]:
    value = row.get("entity_spans")
    if value is None:
        raise RowError("entity_spans", "is missing")
    texts = value.get("text") if isinstance(value, Mapping) else None
    starts = value.get("start") if isinstance(value, Mapping) else None
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(type(start) is int for start in starts)
    ):
        raise RowError("entity_spans", f"must hold as many `text` as `start` and is {value!r:.60}")
    return list(zip(texts, starts, strict=True))


def _places(passage: str, answer: str, entities: list[Place]) -> list[Place]:
    """List where the passage names the entity; wherever it says so if it is not marked."""
    marked = [
        (text, start)
        for text, start in entities
        if text == answer and start >= 0 and passage.startswith(answer, start)
    ]
    places = marked or find(passage, answer)
    if not places:
        raise RowError("answers", f"has {answer!r:.60}, which is not in the passage")
    return places


RECORD = ReCoRD()
