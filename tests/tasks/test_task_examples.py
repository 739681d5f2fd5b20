"""A row becomes a prompt and a response, and the tasks go by their names.

Tasks about a text that holds the answer are in `test_reading.py`, MT-Bench in `test_mt_bench.py`.
"""

import pytest

from loralloc.tasks.alpaca import ALPACA, alpaca_example
from loralloc.tasks.boolq import BOOLQ
from loralloc.tasks.catalog import TASKS, get_task
from loralloc.tasks.copa import COPA
from loralloc.tasks.e2e import E2E
from loralloc.tasks.qnli import QNLI
from loralloc.tasks.rte import RTE
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


ENTAILED = "Are sentence 1 and sentence 2 have entailment relation or not?"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (RTE, {"sentence1": "A cat sat. ", "sentence2": "An animal sat.", "label": 0}),
        (QNLI, {"question": "A cat sat. ", "sentence": "An animal sat.", "label": 0}),
    ],
)
def test_entailment_is_prompted_with_both_sentences(task, row):
    assert task.example(row) == Example(
        prompt=f"sentence 1: A cat sat.\nsentence 2: An animal sat.\n{ENTAILED}",
        response="entailment",
        label=0,
        text="A cat sat.",
        text_pair="An animal sat.",
    )
    assert task.example({**row, "label": 1}).response == "not entailment"


def test_boolq_is_prompted_as_in_the_paper():
    row = {"question": "is it wet ", "passage": "Rain -- It fell.", "idx": 3, "label": 1}
    assert BOOLQ.example(row) == Example(
        prompt="Reference document:\nRain -- It fell.\nQuestion:\nis it wet",
        response="yes",
        label=1,
        text="is it wet",
        text_pair="Rain -- It fell.",
    )
    assert BOOLQ.example({**row, "label": 0}).response == "no"


COPA_ROW = {
    "premise": "The street was wet.",
    "choice1": "It rained.",
    "choice2": "It snowed in May.",
    "question": "cause",
    "idx": 0,
    "label": 0,
}


def test_copa_is_prompted_with_both_choices_and_the_question_spelt_out():
    assert COPA.example(COPA_ROW) == Example(
        prompt=(
            "Premise:\nThe street was wet.\nChoice 1: It rained.\nChoice 2: It snowed in May.\n"
            "Question:\nWhat was the cause?"
        ),
        response="1",
        label=0,
        text="The street was wet. What was the cause?",
        text_pair="Choice 1: It rained. Choice 2: It snowed in May.",
    )
    effect = COPA.example({**COPA_ROW, "question": "effect", "label": 1})
    assert effect.response == "2"
    assert effect.prompt.endswith("Question:\nWhat happened as a result?")


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
    expected = Example(
        prompt="Instruction:\nSort these.\n\nInput:\nb, a\n\nResponse:", response="a, b"
    )
    assert alpaca_example(row) == ALPACA.example(row) == expected


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
        (RTE, {"sentence1": "a", "sentence2": " ", "label": 0}, "sentence2", "is empty"),
        (RTE, {"sentence1": "a", "sentence2": "b", "label": -1}, "label", "hidden label"),
        (
            QNLI,
            {"question": "a", "sentence": "b", "label": "yes"},
            "label",
            "must be one of 0 (entailment), 1 (not entailment) and is 'yes'",
        ),
        (QNLI, {"sentence": "b", "label": 0}, "question", "is missing"),
        (BOOLQ, {"question": "a", "passage": "b", "label": True}, "label", "and is True"),
        (BOOLQ, {"question": "a", "passage": ["b"], "label": 1}, "passage", "must be text"),
        (
            COPA,
            {**COPA_ROW, "question": "What was the cause?"},
            "question",
            "must be cause or effect and is 'What was the cause?'",
        ),
        (COPA, {**COPA_ROW, "choice2": None}, "choice2", "is missing"),
        (COPA, {**COPA_ROW, "label": 2}, "label", "0 (1), 1 (2) and is 2"),
        (ALPACA, {"instruction": "Go.", "output": " "}, "output", "is empty"),
        (E2E, {"human_reference": "x"}, "meaning_representation", "is missing"),
        (TASKS["demo"], {"prompt": "p", "completion": " "}, "completion", "is empty"),
        (
            TASKS["demo"],
            {"prompt": "p", "completion": "c", "references": [1]},
            "references",
            "must be a list of texts",
        ),
        (
            TASKS["demo"],
            {"prompt": "p", "completion": "c", "references": ["c", " "]},
            "references",
            "holds an empty text",
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


STRANGE = (
    "\u05e9\u05dc\u05d5\u05dd \U0001f468\u200d\U0001f469 \u0645\u0631\u062d\u0628\u0627 e\u0301"
)


def test_emoji_and_right_to_left_text_are_kept_character_by_character():
    assert SST2.example({"sentence": STRANGE, "label": 0}).text == STRANGE
    row = {"meaning_representation": f"name[{STRANGE}]", "human_reference": STRANGE}
    assert E2E.example(row).references == (STRANGE,)


def test_a_text_of_100_000_characters_is_not_cut():
    passage = "It rained. " * 10_000
    example = BOOLQ.example({"question": "was it wet", "passage": passage, "label": 1})
    assert example.text_pair == passage.strip()
    assert passage.strip() in example.prompt


@pytest.mark.parametrize("name", TASKS)
def test_tasks_go_by_their_own_name_and_metric(name):
    task = get_task(name)
    assert task.name == name
    assert task.labels == () or task.metrics == ("accuracy",)
    expected = {"alpaca": (), "mt_bench": ("judge", "rouge-l"), "demo": ("bleu",)}
    expected |= {"squad": ("f1-em",), "record": ("f1-em",), "e2e": ("bleu", "rouge-l", "meteor")}
    assert task.metrics == expected.get(name, ("accuracy",))
    assert task.licence


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no task 'SST-2' \(did you mean 'sst2'\?\)"):
        get_task("SST-2")
    with pytest.raises(ValueError, match="no task 'wmt'; the tasks are sst2, rte, qnli, boolq, "):
        get_task("wmt")
