"""Texts and numbered labels, from a task, from named columns, from a schema with names."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from loralloc.tasks.catalog import get_task
from loralloc.tasks.classification import to_classification
from loralloc.tasks.source import Split


def split(*rows, name="train", features=None):
    dataset = Dataset.from_list(list(rows), features=features, on_mixed_types="use_json")
    return Split(name=name, dataset=dataset, source=f"{name}.jsonl")


def pairs(*labels, text="text", label="label", name="train"):
    return split(*({text: f"t{i}", label: value} for i, value in enumerate(labels)), name=name)


def test_a_task_gives_its_texts_and_labels():
    rows = [{"sentence": "fine ", "label": 1}, {"sentence": "dull", "label": 0}]
    splits, names = to_classification({"test": split(*rows, name="test")}, get_task("sst2"))
    assert names == ("negative", "positive")
    assert splits["test"].dataset.to_list() == [
        {"text": "fine", "label": 1},
        {"text": "dull", "label": 0},
    ]
    assert splits["test"].source == "test.jsonl"


def test_a_task_about_two_texts_gives_both():
    rows = [{"question": "is it wet", "passage": "It rained.", "label": 1}]
    splits, names = to_classification({"train": split(*rows)}, get_task("boolq"))
    assert names == ("no", "yes")
    assert splits["train"].dataset.to_list() == [
        {"text": "is it wet", "text_pair": "It rained.", "label": 1}
    ]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a", "c", "a"], ("a", "b", "c"), [1, 0, 2, 0]),
        ([1, 0, 1], ("0", "1"), [1, 0, 1]),
        ([10, 9, -1], ("-1", "9", "10"), [2, 1, 0]),
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),  # from CSV
        (["10", "9", "x"], ("10", "9", "x"), [0, 1, 2]),
        ([True, False], ("False", "True"), [1, 0]),
    ],
)
def test_labels_are_numbered_in_ascending_order(labels, names, numbers):
    splits, found = to_classification({"train": pairs(*labels)})
    assert found == names
    assert splits["train"].dataset["label"][:] == numbers
    assert splits["train"].dataset["text"][:] == [f"t{i}" for i in range(len(labels))]
    assert splits["train"].dataset.column_names == ["text", "label"]


def test_other_splits_are_numbered_as_train_is():
    splits, names = to_classification(
        {"validation": pairs("c", name="validation"), "train": pairs("a", "b", "c")}
    )
    assert names == ("a", "b", "c")
    assert list(splits) == ["validation", "train"]
    assert splits["validation"].dataset["label"][:] == [2]


def test_the_text_may_be_a_sentence_or_in_a_column_given_by_name():
    assert to_classification({"train": pairs(0, 1, text="sentence")})[1] == ("0", "1")
    rows = [{"text": "no", "review": "yes", "label": 5, "stars": s} for s in (1, 2)]
    splits, names = to_classification(
        {"train": split(*rows)}, text_column="review", label_column="stars"
    )
    assert names == ("1", "2")
    assert splits["train"].dataset.to_list()[0] == {"text": "yes", "label": 0}


def test_the_second_text_is_in_a_column_given_by_name():
    rows = [{"text": "no", "q": f"q{n}", "a": f"a{n}", "label": n} for n in (0, 1)]
    both = {"train": split(*rows), "test": split(rows[1], name="test")}
    splits, _ = to_classification(both, text_column="q", text_pair_column="a")
    assert splits["train"].dataset.column_names == ["text", "text_pair", "label"]
    assert splits["train"].dataset.to_list()[0] == {"text": "q0", "text_pair": "a0", "label": 0}
    assert splits["test"].dataset.to_list() == [{"text": "q1", "text_pair": "a1", "label": 1}]


def test_a_second_text_that_is_none_is_named():
    rows = [{"text": "t", "pair": "p", "label": 0}, {"text": "t", "pair": None, "label": 1}]
    message = refuses({"train": split(*rows)}, text_pair_column="pair")
    assert message == "Row 2 of train.jsonl: field 'pair' must be text and is None."


def test_text_comes_before_sentence():
    rows = [{"sentence": "no", "text": "yes", "label": n} for n in (0, 1)]
    splits, _ = to_classification({"train": split(*rows)})
    assert splits["train"].dataset["text"][:] == ["yes", "yes"]


FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["red", "green", "blue"])})


def test_names_in_the_schema_are_kept_also_of_labels_that_no_row_has():
    rows = [{"text": "t", "label": 2}, {"text": "u", "label": 0}]
    splits, names = to_classification({"train": split(*rows, features=FEATURES)})
    assert names == ("red", "green", "blue")
    assert splits["train"].dataset["label"][:] == [2, 0]


def refuses(splits, task=None, **columns):
    with pytest.raises(ValueError) as caught:
        to_classification(splits, task, **columns)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_hidden_label_of_the_hub_is_refused():
    rows = [{"text": "t", "label": 0}, {"text": "u", "label": -1}]
    message = refuses({"train": split(*rows, features=FEATURES)})
    assert message == "Row 2 of train.jsonl: field 'label' must be one of 0, 1, 2 and is -1."


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", 0), ("b", 1.5)], "Row 1 of train.jsonl: field 'label' must be a whole number or a"),
        (
            [("a", "x"), ("b", None)],
            "Row 2 of train.jsonl: field 'label' must be a whole number or",
        ),
        ([("a", "x"), ("b", 1)], "train.jsonl: the column 'label' mixes numbers and texts"),
        ([("a", "x"), ("b", " ")], "Row 2 of train.jsonl: field 'label' must be a whole number or"),
        ([("a", 1), ("b", 1)], "train.jsonl: every row has the same label"),
        ([("a", 0), (None, 1)], "Row 2 of train.jsonl: field 'text' must be text and is None"),
    ],
)
def test_rows_that_no_classifier_can_use_are_named(rows, words):
    given = split(*({"text": text, "label": label} for text, label in rows))
    assert words in refuses({"train": given})


@pytest.mark.parametrize("stranger", ["d", 0, None, [1]])
def test_a_label_that_train_does_not_have_is_named(stranger):
    splits = {"train": pairs("a", "b"), "test": pairs("a", stranger, name="test")}
    message = refuses(splits)
    assert "Row 2 of test.jsonl: field 'label' must be one of 'a', 'b' and is " in message
    assert repr(stranger) in message


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        (
            {"body": "b", "label": 0},
            {},
            "columns body, label, and classification reads text or senten",
        ),
        ({"text": "b", "y": 0}, {}, "reads text or sentence with label"),
        (
            {"text": "b", "label": 0},
            {"text_column": "body"},
            "classification reads body with label",
        ),
        ({"text": "b", "label": 0}, {"label_column": "y"}, "reads text or sentence with y"),
        (
            {"text": "b", "label": 0},
            {"text_pair_column": "other"},
            "reads text or sentence with other and label: name others with text_column, text_pair",
        ),
    ],
)
def test_missing_columns_are_named_with_those_found(row, columns, words):
    message = refuses({"train": split(row)}, **columns)
    assert words in message
    assert message.startswith("train.jsonl has the columns ")


def test_a_task_is_refused_where_it_has_no_labels_or_is_told_its_columns():
    rows = split({"meaning_representation": "a[b]", "human_reference": "A b."})
    assert "e2e generates text and has no labels" in refuses({"train": rows}, get_task("e2e"))
    labelled = split({"sentence": "s", "label": 0})
    for column in ("text_column", "text_pair_column", "label_column"):
        message = refuses({"train": labelled}, get_task("sst2"), **{column: "sentence"})
        assert "leave out text_column, text_pair_column and label_column" in message
