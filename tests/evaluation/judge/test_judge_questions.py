import json

import pytest

from loralloc.evaluation.judge.questions import (
    Question,
    check_answers,
    load_questions,
    read_answers,
)

ROWS = [
    {"question_id": 7, "category": "writing", "turns": ["Name a fruit.", "Another."]},
    {"question_id": 9, "turns": ["Count."]},
]


@pytest.fixture
def write(write_rows, tmp_path):
    return lambda rows, name="test.jsonl": write_rows(tmp_path / "data" / name, rows)


def test_questions_of_a_folder_and_of_a_file(write, tmp_path):
    path = write(ROWS)
    write([{"question_id": 7, "turns": ["An apple.", "A pear."]}], "gpt4_answers.jsonl")
    expected = [
        Question(number=7, turns=("Name a fruit.", "Another."), category="writing"),
        Question(number=9, turns=("Count.",)),
    ]
    assert load_questions(str(path.parent)) == expected
    assert load_questions(str(path)) == expected
    assert load_questions(str(path), limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": ["a"]}, "Row 2 of .*test.jsonl: field 'question_id' must be a whole number"),
        ({"question_id": "eight", "turns": ["a"]}, "must be a whole number and is 'eight'"),
        ({"question_id": 8}, "field 'turns' is missing"),
        ({"question_id": 8, "turns": "a"}, "field 'turns' must be a list of texts and is 'a'"),
        ({"question_id": 8, "turns": []}, "field 'turns' is empty"),
        ({"question_id": 8, "turns": ["a", " "]}, "field 'turns' holds an empty text"),
        ({"question_id": 7, "turns": ["a"]}, "field 'question_id' is 7, as in an earlier row"),
    ],
)
def test_a_question_that_breaks_the_form(row, words, write):
    with pytest.raises(ValueError, match=words):
        load_questions(str(write([ROWS[0], row])))


def test_no_questions(tmp_path):
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_questions(str(tmp_path))


@pytest.mark.parametrize(
    "given",
    [
        {"turns": ["Apple \U0001f34e", ""]},
        {"choices": [{"index": 0, "turns": ["Apple \U0001f34e", ""]}]},
    ],
    ids=("turns", "FastChat"),
)
def test_answers(given, write):
    path = write([{"question_id": 7, "model_id": "m", **given}], "answers.jsonl")
    assert read_answers(path) == {7: ("Apple \U0001f34e", "")}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 7, "turns": ["a"]}, r"Row 2 of .*: field 'question_id' is 7, as in an"),
        ({"question_id": 8, "turns": "a"}, "field 'turns' must be a list of texts and is 'a'"),
        ({"question_id": 8, "turns": []}, r"must be a list of texts and is \[\]"),
        ({"question_id": 8}, "must be a list of texts and is None"),
        ({"turns": ["a"]}, "field 'question_id' must be a whole number and is None"),
    ],
)
def test_an_answer_that_breaks_the_form(row, words, write):
    with pytest.raises(ValueError, match=words):
        read_answers(write([{"question_id": 7, "turns": ["a", "b"]}, row], "answers.jsonl"))


def test_answers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .* with answers"):
        read_answers(tmp_path / "answers.jsonl")
    (tmp_path / "answers.txt").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="its name ends in none of"):
        read_answers(tmp_path / "answers.txt")


@pytest.mark.parametrize("given", ({}, {7: ("a",)}, {7: ("a", "b", "c")}))
def test_every_turn_must_be_answered(given):
    questions = [Question(number=7, turns=("a", "b"))]
    check_answers({7: ("c", "d"), 8: ("e",)}, questions, source="mine")
    with pytest.raises(ValueError, match=r"mine has \d answers to question 7, which has 2 turns"):
        check_answers(given, questions, source="mine")
