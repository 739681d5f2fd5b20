"""MT-Bench: turns for a judge, right answers where there are some, GPT-4's in their own file."""

import pytest

from loralloc.tasks.mt_bench import MT_BENCH, gpt4_answers
from loralloc.tasks.task import Example, RowError

TURNS = ("How many legs has a horse?", "And two of them?")


def row(**changes):
    return {"question_id": 101, "category": "math", "turns": list(TURNS), **changes}


@pytest.mark.parametrize("nothing", [{}, {"reference": []}, {"reference": None}])
def test_the_prompt_is_the_first_turn_and_no_response_is_right(nothing):
    assert MT_BENCH.example(row(**nothing)) == Example(prompt=TURNS[0], response="", turns=TURNS)


def test_right_answers_belong_to_turns_and_may_be_left_out():
    example = MT_BENCH.example(row(reference=["Four.", ""]))
    assert example.turn_references == ("Four.", "")
    assert example.references == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"turns": None}, "field 'turns' is missing"),
        ({"turns": []}, "field 'turns' is empty"),
        ({"turns": "How many?"}, "field 'turns' must be a list of texts"),
        ({"turns": ["How many?", " "]}, "field 'turns' holds an empty text"),
        ({"reference": ["Four."]}, "field 'reference' has 1 texts for 2 turns"),
        ({"reference": "Four."}, "field 'reference' must be a list of texts"),
        ({"reference": [4, 8]}, "field 'reference' must be a list of texts"),
    ],
)
def test_a_row_that_breaks_the_contract_names_its_field(changes, words):
    with pytest.raises(RowError) as caught:
        MT_BENCH.example(row(**changes))
    assert words in str(caught.value)


def test_gpt4_answers_are_read_by_question(write, tmp_path):
    assert gpt4_answers(tmp_path) == {}
    answers = [{"question_id": i, "model_id": "gpt-4", "turns": ["a", f"b{i}"]} for i in (7, 8)]
    path = write("gpt4_answers.jsonl", answers)
    assert gpt4_answers(tmp_path) == {7: ("a", "b7"), 8: ("a", "b8")}

    write(path.name, [answers[0], {"question_id": 8, "turns": []}])
    with pytest.raises(
        ValueError, match=r"^Row 2 of .*gpt4_answers\.jsonl: field 'turns' is empty"
    ):
        gpt4_answers(tmp_path)
    write(path.name, [{"question_id": "7", "turns": ["a"]}])
    with pytest.raises(ValueError, match="field 'question_id' must be a number and is '7'"):
        gpt4_answers(tmp_path)
