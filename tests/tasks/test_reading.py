"""SQuAD and ReCoRD: the answer is a stretch of the context, and its place is exact."""

import pytest

from loralloc.tasks.record import RECORD
from loralloc.tasks.squad import SQUAD
from loralloc.tasks.task import Example, RowError, Span

CONTEXT = " Ada met Bo in Rome.\nBo left  Rome in May."


def squad_row(*answers, context=CONTEXT):
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return {
        "id": "1",
        "context": context,
        "question": "Where was Bo? ",
        "answers": {"text": texts, "answer_start": starts},
    }


def places(example):
    span = example.span
    for answer, start in zip(span.answers, span.starts, strict=True):
        assert span.context[start : start + len(answer)] == answer
    return list(zip(span.answers, span.starts, strict=True))


def test_squad_is_prompted_as_in_the_paper():
    assert SQUAD.example(squad_row(("Rome", 15))) == Example(
        prompt=("Context:\nAda met Bo in Rome.\nBo left  Rome in May.\nQuestion:\nWhere was Bo?"),
        response="Rome",
        span=Span(question="Where was Bo?", context=CONTEXT, answers=("Rome",), starts=(15,)),
        references=("Rome",),
    )


def test_of_several_answers_the_first_is_trained_on_and_any_is_right():
    example = SQUAD.example(squad_row(("in Rome", 12), ("Rome", 15), ("in Rome", 12), ("Rome", 30)))
    assert example.response == "in Rome"
    assert example.references == ("in Rome", "Rome")
    assert places(example) == [("in Rome", 12), ("Rome", 15), ("Rome", 30)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (("Rome", 14), ("Rome", 15)),  # off by one
        (("Rome", 24), ("Rome", 30)),  # the nearest
        (("Rome", 22), ("Rome", 15)),
        (("May.", -4), ("May.", 38)),  # not counted from the end
        (("Rome", 10**6), ("Rome", 30)),
        ((" Rome ", 14), ("Rome", 15)),
        (("left Rome", 24), ("left  Rome", 24)),  # blanks of the answer are not the context's
        (("in  Rome. Bo", 12), ("in Rome.\nBo", 12)),
    ],
)
def test_an_answer_is_found_where_its_blanks_or_its_position_are_off(answer, found):
    example = SQUAD.example(squad_row(answer))
    assert places(example) == [found]
    assert example.response == answer[0].strip()


SHALOM = "\u05e9\u05dc\u05d5\u05dd"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji, five characters


def test_positions_count_characters_also_of_emoji_and_right_to_left_text():
    context = f"\U0001f600 {SHALOM} (a+b)* {FAMILY} end"
    for answer in (
        "\u05e9\u05dc\u05d5\u05dd",
        "(a+b)*",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    ):
        start = context.index(answer)
        assert places(SQUAD.example(squad_row((answer, start), context=context))) == [
            (answer, start)
        ]
        assert places(SQUAD.example(squad_row((answer, 0), context=context))) == [(answer, start)]


def test_a_context_of_100_000_characters_is_kept_whole():
    context = "word " * 20_000 + "Rome"
    example = SQUAD.example(squad_row(("Rome", 0), context=context))
    assert places(example) == [("Rome", 100_000)]
    assert len(example.span.context) == 100_004
    assert context in example.prompt


def refused(task, row):
    with pytest.raises(RowError) as caught:
        task.example(row)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": " "}, "field 'context' is empty"),
        ({"question": None}, "field 'question' is missing"),
        ({"answers": None}, "field 'answers' is missing"),
        ({"answers": "Rome"}, "field 'answers' must hold `text` and `answer_start` and is 'Rome'"),
        ({"answers": ["Rome"]}, "field 'answers' must hold `text`"),
        ({"answers": {"text": ["Rome"]}}, "field 'answers' must hold `text` and `answer_start`"),
        (
            {"answers": {"text": [], "answer_start": []}},
            "field 'answers.text' is empty",
        ),
        (
            {"answers": {"text": ["Rome", ""], "answer_start": [15, 0]}},
            "field 'answers.text' holds an empty text",
        ),
        (
            {"answers": {"text": "Rome", "answer_start": [15]}},
            "field 'answers.text' must be a list of texts",
        ),
        (
            {"answers": {"text": ["Rome"], "answer_start": ["15"]}},
            "field 'answers.answer_start' must list whole numbers and is ['15']",
        ),
        (
            {"answers": {"text": ["Rome"], "answer_start": [15, 30]}},
            "field 'answers.answer_start' has 2 positions for 1 answers",
        ),
        (
            {"answers": {"text": ["Rome", "Paris"], "answer_start": [15, 0]}},
            "field 'answers.text' has 'Paris', which is not in the context",
        ),
    ],
)
def test_a_squad_row_that_breaks_the_contract_names_its_field(changes, words):
    assert words in refused(SQUAD, {**squad_row(("Rome", 15)), **changes})


PASSAGE = "Bo Li met Ada in Oslo. Bo won.\n@highlight\nAda and Bo play for Bolton"


def record_row(*answers, entities=(("Bo Li", 0), ("Ada", 10), ("Bo", 23), ("Ada", 42), ("Bo", 50))):
    return {
        "passage": PASSAGE,
        "query": "@placeholder won again.",
        "entities": list(dict.fromkeys(text for text, _ in entities)),
        "entity_spans": {
            "text": [text for text, _ in entities],
            "start": [start for _, start in entities],
            "end": [start + len(text) for text, start in entities],
        },
        "answers": list(answers),
        "idx": {"passage": 0, "query": 0},
    }


def test_record_has_every_place_that_names_an_answer():
    example = RECORD.example(record_row("Bo", "Bo Li"))
    assert example.prompt == f"Context:\n{PASSAGE}\nQuestion:\n@placeholder won again."
    assert example.response == "Bo"  # the first is trained on
    assert example.references == ("Bo", "Bo Li")
    # Neither the "Bo" of "Bo Li" nor that of "Bolton": they are no marked entities.
    assert places(example) == [("Bo", 23), ("Bo", 50), ("Bo Li", 0)]


def test_an_entity_that_is_marked_nowhere_or_wrongly_is_looked_for():
    entities = (("Ada", 11), ("Ada", 42 - len(PASSAGE)), ("Bo", 23))
    assert places(RECORD.example(record_row("Ada", entities=entities))) == [
        ("Ada", 10),
        ("Ada", 42),
    ]
    assert places(RECORD.example(record_row("Oslo"))) == [("Oslo", 17)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passage": None}, "field 'passage' is missing"),
        ({"query": ""}, "field 'query' is empty"),
        ({"answers": None}, "field 'answers' is missing"),
        ({"answers": []}, "field 'answers' is empty"),
        ({"answers": "Bo"}, "field 'answers' must be a list of texts and is 'Bo'"),
        ({"answers": ["Bo", "Paris"]}, "field 'answers' has 'Paris', which is not in the passage"),
        ({"entity_spans": None}, "field 'entity_spans' is missing"),
        ({"entity_spans": ["Bo"]}, "field 'entity_spans' must hold as many `text` as `start`"),
        ({"entity_spans": {"text": ["Bo"], "start": []}}, "field 'entity_spans' must hold as"),
        ({"entity_spans": {"text": ["Bo"], "start": ["0"]}}, "field 'entity_spans' must hold as"),
    ],
)
def test_a_record_row_that_breaks_the_contract_names_its_field(changes, words):
    assert words in refused(RECORD, {**record_row("Bo"), **changes})
