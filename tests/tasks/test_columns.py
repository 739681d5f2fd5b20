"""Any of the accepted columns become what TRL reads; any others are named."""

import json

import pytest
from datasets import Dataset

from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import merge_references, to_examples, to_sft
from loralloc.tasks.source import Split, load_splits
from loralloc.tasks.task import Example

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def split(*rows):
    dataset = Dataset.from_list(list(rows), on_mixed_types="use_json")
    return Split(name="train", dataset=dataset, source="rows.jsonl")


def sft_rows(*rows, task=None):
    splits = to_sft({"train": split(*rows)}, task and get_task(task))
    assert list(splits) == ["train"]
    assert splits["train"].source == "rows.jsonl"
    return splits["train"].dataset.to_list()


def test_a_task_gives_prompt_and_completion_and_nothing_else():
    rows = sft_rows({"sentence": "fine ", "label": 1, "idx": 0}, task="sst2")
    assert rows == [
        {"prompt": "fine\nThe sentiment of the given sentence is:", "completion": " positive"}
    ]


def test_the_same_rows_give_the_same_examples_from_every_format(write, tmp_path):
    rows = [{"sentence": '\u00e9clair, "good" ', "label": 1}, {"sentence": "dull ", "label": 0}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    paths = [
        write("rows.jsonl", rows),
        write("rows.json", json.dumps(rows)),
        write("rows.csv", 'label,sentence\n1,"\u00e9clair, ""good"" "\n0,dull \n'),
        tmp_path / "rows.parquet",
    ]
    sst2 = get_task("sst2")
    expected = [sst2.example(row) for row in rows]
    for path in paths:
        assert to_examples(load_splits(path)["train"], sst2) == expected


def test_every_split_is_turned():
    splits = to_sft({"train": split({"text": "a"}), "test": split({"text": "b"})})
    assert splits["train"].dataset.to_list() == [{"text": "a"}]
    assert splits["test"].dataset.to_list() == [{"text": "b"}]


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"prompt": "p ", "completion": "c"}, ("prompt", "completion")),
        ({"prompt": "", "completion": "c"}, ("prompt", "completion")),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, ("prompt", "completion")),
        ({"messages": MESSAGES}, ("messages",)),
        ({"messages": MESSAGES, "tools": "[]"}, ("messages", "tools")),
        (
            {"messages": MESSAGES, "chat_template_kwargs": "{}"},
            ("messages", "chat_template_kwargs"),
        ),
        ({"text": " plain "}, ("text",)),
        ({"text": "t", "tools": "[]", "messages": MESSAGES}, ("messages", "tools")),
        ({"text": "t", "tools": "[]"}, ("text",)),
        (
            {"text": "t", "prompt": "p", "completion": "c", "messages": MESSAGES},
            ("prompt", "completion"),
        ),
    ],
)
def test_known_columns_are_passed_on_as_they_are_and_others_dropped(row, kept):
    assert sft_rows({**row, "id": 1}) == [{column: row[column] for column in kept}]


@pytest.mark.parametrize("text", [{}, {"text": "all of it"}])
def test_alpaca_columns_become_prompt_and_completion(text):
    assert sft_rows({**ALPACA, **text}) == [
        {
            "prompt": "Instruction:\nAdd.\n\nInput:\n1 + 1\n\nResponse:",
            "completion": " 2",
        }
    ]


def refuses(*rows, task=None):
    with pytest.raises(ValueError) as caught:
        sft_rows(*rows, task=task)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_unknown_columns_are_listed_with_the_accepted_ones():
    assert refuses({"question": "q", "answer": "a"}).startswith(
        "rows.jsonl has the columns question, answer, and training reads one of: "
        "prompt + completion; messages; instruction + output; text"
    )


def test_a_task_says_which_of_its_columns_are_missing():
    assert refuses({"sentence": "s", "score": 1}, task="sst2") == (
        "The task sst2 reads the columns sentence, label; "
        "rows.jsonl lacks label and has sentence, score."
    )


GOOD = {"sentence": "fine", "label": 1}


@pytest.mark.parametrize(
    ("rows", "task", "words"),
    [
        ([{"question_id": 1, "turns": ["a", "b"]}], "mt_bench", "mt_bench has no responses to"),
        ([GOOD, GOOD | {"label": 3}], "sst2", "Row 2 of rows.jsonl: field 'label' must be one of"),
        (
            [GOOD, GOOD, GOOD | {"sentence": None}],
            "sst2",
            "Row 3 of rows.jsonl: field 'sentence' is",
        ),
        ([ALPACA, ALPACA | {"output": ""}], None, "Row 2 of rows.jsonl: field 'output' is empty"),
        ([{"text": "a"}, {"text": None}], None, "Row 2 of rows.jsonl: field 'text' is missing"),
        (
            [{"text": "a"}, {"text": 5}],
            None,
            "Row 2 of rows.jsonl: field 'text' must be text and is 5",
        ),
        ([{"text": [1]}], None, "Row 1 of rows.jsonl: field 'text' must be text and is [1]"),
        ([{"prompt": "p", "completion": " "}], None, "field 'completion' is empty"),
        ([{"prompt": None, "completion": "c"}], None, "field 'prompt' is missing"),
        ([{"messages": "hi"}], None, "field 'messages' must be a list of messages and is 'hi'"),
        ([{"messages": MESSAGES}, {"messages": []}], None, "Row 2 of rows.jsonl: field 'messages'"),
    ],
)
def test_a_bad_row_is_named_with_its_source_number_and_field(rows, task, words):
    assert words in refuses(*rows, task=task)


def test_examples_name_bad_rows_and_missing_columns_too():
    sst2 = get_task("sst2")
    assert [example.label for example in to_examples(split(GOOD, GOOD), sst2)] == [1, 1]
    with pytest.raises(ValueError, match=r"Row 1 of rows\.jsonl: field 'label'"):
        to_examples(split(GOOD | {"label": 9}), sst2)
    with pytest.raises(ValueError, match="lacks label"):
        to_examples(split({"sentence": "s"}), sst2)


def test_references_of_one_prompt_are_brought_together_in_order():
    def example(prompt, *references):
        return Example(prompt=prompt, response=references[0], references=references)

    merged = merge_references(
        [example("b", "1"), example("a", "2", "3"), example("b", "4", "1"), example("a", "3")]
    )
    assert merged == [example("b", "1", "4"), example("a", "2", "3")]
