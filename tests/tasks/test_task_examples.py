"""A row becomes a prompt and a response: SST-2, E2E, Alpaca, and the catalogue of tasks."""

import pytest

from loralloc.tasks.alpaca import alpaca_example
from loralloc.tasks.catalog import TASKS, get_task
from loralloc.tasks.e2e import E2E
from loralloc.tasks.sst2 import SST2
from loralloc.tasks.task import Example, RowError


def test_sst2_is_prompted_as_in_the_paper():
    example = SST2.example({"sentence": "a quiet , lovely film ", "label": 1, "idx": 7})
    assert example == Example(
        prompt="a quiet , lovely film\nThe sentiment of the given sentence is:",
        response="positive",
        label=1,
        text="a quiet , lovely film",
    )
    assert SST2.example({"sentence": "dull ", "label": 0}).response == "negative"
    assert SST2.example({"sentence": "fine", "label": "1"}).label == 1  # from CSV


def test_e2e_is_prompted_as_in_the_paper():
    meaning = "name[Nowhere Inn], food[Welsh]"
    example = E2E.example({"meaning_representation": meaning, "human_reference": "Eat Welsh. "})
    assert example == Example(
        prompt=f"Reference:\n{meaning}\nGenerate a customer review following the given reference.",
        response="Eat Welsh.",
        references=("Eat Welsh.",),
    )


def test_alpaca_names_the_parts_of_its_prompt():
    row = {"instruction": "Sort these.", "input": "b, a", "output": "a, b"}
    assert alpaca_example(row) == Example(
        prompt="Instruction:\nSort these.\n\nInput:\nb, a\n\nResponse:", response="a, b"
    )


@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_alpaca_without_an_input_leaves_that_part_out(nothing):
    row = {"instruction": "Say hello.", "input": nothing, "output": "Hello."}
    assert alpaca_example(row).prompt == "Instruction:\nSay hello.\n\nResponse:"
    del row["input"]
    assert alpaca_example(row).prompt == "Instruction:\nSay hello.\n\nResponse:"


EXAMPLES = [
    SST2.example({"sentence": "fine ", "label": 1}),
    E2E.example({"meaning_representation": "name[X] ", "human_reference": " X is open."}),
    TASKS["demo"].example({"prompt": "name: X\nDescription:", "completion": " X is open."}),
    alpaca_example({"instruction": "Go.\n", "output": "\nGone. "}),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_one_blank_joins_prompt_and_completion(example):
    assert example.prompt == example.prompt.strip()
    assert example.completion == " " + example.completion.strip()


@pytest.mark.parametrize(
    ("task", "row", "field", "words"),
    [
        (SST2, {"label": 1}, "sentence", "is missing"),
        (SST2, {"sentence": None, "label": 1}, "sentence", "is missing"),
        (SST2, {"sentence": "  ", "label": 1}, "sentence", "is empty"),
        (SST2, {"sentence": 12, "label": 1}, "sentence", "must be text and is 12"),
        (SST2, {"sentence": "x"}, "label", "is missing"),
        (SST2, {"sentence": "x", "label": -1}, "label", "hidden label"),
        (SST2, {"sentence": "x", "label": 2}, "label", "0 (negative), 1 (positive) and is 2"),
        (SST2, {"sentence": "x", "label": True}, "label", "and is True"),
        (SST2, {"sentence": "x", "label": "-1"}, "label", "hidden label"),
        (SST2, {"sentence": "x", "label": "positive"}, "label", "and is 'positive'"),
        (SST2, {"sentence": "x", "label": "01"}, "label", "and is '01'"),
        (SST2, {"sentence": "x", "label": 1.0}, "label", "and is 1.0"),
        (
            E2E,
            {"meaning_representation": "a[b]", "human_reference": ""},
            "human_reference",
            "empty",
        ),
        (E2E, {"human_reference": "x"}, "meaning_representation", "is missing"),
        (TASKS["demo"], {"prompt": "p", "completion": " "}, "completion", "is empty"),
        (
            TASKS["demo"],
            {"prompt": "p", "completion": "c", "references": [1]},
            "references",
            "must be a list of texts",
        ),
    ],
)
def test_a_row_that_breaks_the_contract_names_its_field(task, row, field, words):
    with pytest.raises(RowError) as caught:
        task.example(row)
    assert caught.value.field == field
    assert f"field '{field}'" in str(caught.value)
    assert words in str(caught.value)


def test_demo_rows_without_references_are_measured_against_themselves():
    example = TASKS["demo"].example({"prompt": "p", "completion": " c"})
    assert example.references == ("c",)


@pytest.mark.parametrize("name", ["sst2", "e2e", "demo"])
def test_tasks_go_by_their_own_name(name):
    task = get_task(name)
    assert task.name == name
    assert task.metrics[0] == ("accuracy" if task.labels else "bleu")


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'SST-2' \(did you mean 'sst2'\?\)"):
        get_task("SST-2")
    with pytest.raises(ValueError, match="no task 'wmt'; the tasks are sst2, e2e, demo"):
        get_task("wmt")
