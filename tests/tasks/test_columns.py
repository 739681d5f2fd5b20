"""Any of the accepted columns become what TRL reads; any others are named."""

import json

import pytest
from datasets import Dataset

from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import in_common, merge_references, to_examples, to_sft
from loralloc.tasks.conversations import Common
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
            {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
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


FROM_VALUE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize("column", ("messages", "conversations"))
@pytest.mark.parametrize("messages", (FROM_VALUE, MESSAGES, [FROM_VALUE[0], MESSAGES[1]]))
def test_messages_by_any_name_with_any_keys_are_messages_with_roles(column, messages):
    assert sft_rows({column: messages, "tools": "[]"}) == [{"messages": MESSAGES, "tools": "[]"}]


def test_prompts_and_completions_with_from_and_value_get_roles_too():
    assert sft_rows({"prompt": FROM_VALUE[:1], "completion": FROM_VALUE[1:]}) == [
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    ]


def test_keys_are_renamed_as_trl_renames_them():
    from trl import maybe_convert_to_chatml

    row = {"conversations": [{"from": "user", "value": "a"}, {"from": "tool", "value": "b"}]}
    assert sft_rows(row) == [maybe_convert_to_chatml(row)]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}], None),
        ([{"prompt": "a", "completion": "b"}], None),
        ([{"messages": MESSAGES}], Common()),
        ([{"messages": [SYSTEM, *MESSAGES]}] * 2, Common(system="Be brief.")),
        ([{"messages": [SYSTEM, *MESSAGES]}, {"messages": MESSAGES}], Common()),
        (
            [{"prompt": [SYSTEM, *MESSAGES[:1]], "completion": MESSAGES[1:]}],
            Common(system="Be brief."),
        ),
        (
            [
                {"messages": MESSAGES, "tools": '["t"]', "chat_template_kwargs": {"a": 1, "b": n}}
                for n in (1, 2)
            ],
            Common(template_options={"tools": ["t"], "a": 1}),
        ),
    ],
)
def test_what_conversations_have_in_common(rows, expected):
    assert in_common(to_sft({"train": split(*rows)})["train"].dataset) == expected


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
        "prompt + completion; messages; conversations; instruction + output; text"
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
        (
            [{"messages": MESSAGES}, {"messages": [{"content": "hi"}]}],
            None,
            "Row 2 of rows.jsonl: field 'messages' has in message 1 no `role` (or `from`)",
        ),
        (
            [{"messages": [MESSAGES[0], {"role": "assistant"}]}],
            None,
            "Row 1 of rows.jsonl: field 'messages' has in message 2 no `content` (or `value`)",
        ),
        ([{"messages": ["hi"]}], None, "must be a list of messages, and holds 'hi'"),
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": MESSAGES, "completion": MESSAGES}],
            None,
            "Row 2 of rows.jsonl: field 'prompt' is messages, and what comes before it is text",
        ),
        (
            [{"prompt": MESSAGES[:1], "completion": "c"}],
            None,
            "Row 1 of rows.jsonl: field 'completion' is text, and what comes before it is messages",
        ),
        (
            [{"messages": MESSAGES, "chat_template_kwargs": "{}"}],
            None,
            "field 'chat_template_kwargs' must be an object of options and is '{}'",
        ),
        (
            [{"messages": MESSAGES, "tools": "[{"}],
            None,
            "Row 1 of rows.jsonl: field 'tools' is not valid JSON: Expecting",
        ),
        (
            [{"version": 1, "data": [{"text": "a"}]}],
            None,
            "has the columns version, data, and training reads one of: prompt + completion; "
            "messages; conversations; instruction + output; text (or name the task whose columns "
            "these are); they may be what it has under 'data'.",
        ),
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
