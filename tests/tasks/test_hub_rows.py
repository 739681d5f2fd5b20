"""Rows from the Hub, with its label names and nested columns, give the examples of a folder."""

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from loralloc.tasks import source
from loralloc.tasks.catalog import TASKS, get_task, load_task
from loralloc.tasks.columns import to_examples

TEXT, NUMBER = Value("string"), Value("int32")
ENTAILMENT = ClassLabel(names=["entailment", "not_entailment"])
EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467"

HUB = {
    "sst2": (
        Features(
            {"sentence": TEXT, "label": ClassLabel(names=["negative", "positive"]), "idx": NUMBER}
        ),
        lambda i: {"sentence": f"film {i} ", "label": i % 2, "idx": i},
    ),
    "rte": (
        Features({"sentence1": TEXT, "sentence2": TEXT, "label": ENTAILMENT, "idx": NUMBER}),
        lambda i: {"sentence1": f"It is {i}.", "sentence2": "It is.", "label": i % 2, "idx": i},
    ),
    "qnli": (
        Features({"question": TEXT, "sentence": TEXT, "label": ENTAILMENT, "idx": NUMBER}),
        lambda i: {"question": f"What is {i}?", "sentence": "It is.", "label": i % 2, "idx": i},
    ),
    "boolq": (
        Features(
            {
                "question": TEXT,
                "passage": TEXT,
                "idx": NUMBER,
                "label": ClassLabel(names=["False", "True"]),
            }
        ),
        lambda i: {"question": f"is it {i}", "passage": f"{EMOJI} is.", "idx": i, "label": i % 2},
    ),
    "copa": (
        Features(
            {
                "premise": TEXT,
                "choice1": TEXT,
                "choice2": TEXT,
                "question": TEXT,
                "idx": NUMBER,
                "label": ClassLabel(names=["choice1", "choice2"]),
            }
        ),
        lambda i: {
            "premise": f"It is {i}.",
            "choice1": "a",
            "choice2": "b",
            "question": ("cause", "effect")[i % 2],
            "idx": i,
            "label": i % 2,
        },
    ),
    "record": (
        Features(
            {
                "passage": TEXT,
                "query": TEXT,
                "entities": Sequence(TEXT),
                "entity_spans": Sequence({"text": TEXT, "start": NUMBER, "end": NUMBER}),
                "answers": Sequence(TEXT),
                "idx": {"passage": NUMBER, "query": NUMBER},
            }
        ),
        lambda i: {
            "passage": f"{EMOJI} Bo met Ada.\n@highlight\nAda won {i}",
            "query": "@placeholder won.",
            "entities": ["Bo", "Ada"],
            "entity_spans": {
                "text": ["Bo", "Ada", "Ada"],
                "start": [6, 13, 29],
                "end": [8, 16, 32],
            },
            "answers": ["Ada"],
            "idx": {"passage": i, "query": 0},
        },
    ),
    "squad": (
        Features(
            {
                "id": TEXT,
                "title": TEXT,
                "context": TEXT,
                "question": TEXT,
                "answers": Sequence({"text": TEXT, "answer_start": NUMBER}),
            }
        ),
        lambda i: {
            "id": str(i),
            "title": "T",
            "context": f" {EMOJI} Rome has {i} hills.",
            "question": f"Which town, {i}?",
            "answers": {
                "text": ["Rome", "Rome has"][: i % 2 + 1],
                "answer_start": [7] * (i % 2 + 1),
            },
        },
    ),
    "e2e": (
        Features({"meaning_representation": TEXT, "human_reference": TEXT}),
        lambda i: {"meaning_representation": f"name[{i // 2}]", "human_reference": f"Eat {i}."},
    ),
    "alpaca": (
        Features({"instruction": TEXT, "input": TEXT, "output": TEXT}),
        lambda i: {"instruction": f"Say {i}.", "input": "" if i % 2 else "x", "output": f"{i}"},
    ),
}
"""Columns of each Hub set as its card has them, and rows of our own that fill them."""


def test_every_task_with_a_hub_set_is_here():
    assert set(HUB) == {name for name, task in TASKS.items() if task.hub_name}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_and_a_folder_give_the_same_examples(name, write, tmp_path, monkeypatch):
    task = get_task(name)
    features, make = HUB[name]
    rows = {"train": [make(i) for i in range(1010)], "validation": [make(i) for i in range(9)]}
    hidden = [{**make(i), "label": -1} if task.labels else make(i) for i in range(5)]
    loaded = {k: Dataset.from_list(v, features=features) for k, v in rows.items()}
    official = task.hub_rule == "official"
    if not official:
        loaded["test"] = Dataset.from_list(hidden, features=features)
    monkeypatch.setattr(source, "_load_from_hub", lambda *_: DatasetDict(loaded))
    for split, content in rows.items():
        write(f"set/{split}.jsonl", content)

    hub, folder = load_task(task), load_task(task, tmp_path / "set")
    if not official:  # bring together again what the rule has divided
        assert list(hub) == ["train", "validation", "test"]
    there = [e for split in hub.values() for e in to_examples(split, task)]
    here = [e for split in folder.values() for e in to_examples(split, task)]
    assert sorted(there, key=repr) == sorted(here, key=repr)
    if official:
        assert there == here


@pytest.mark.parametrize("name", ["squad", "record"])
def test_nested_columns_that_mix_types_name_the_row(name, write):
    _, make = HUB[name]
    field = {"squad": "answers", "record": "entity_spans"}[name]
    path = write("train.jsonl", [make(0), {**make(1), field: "somewhere"}])
    with pytest.raises(ValueError, match=rf"^Row 2 of .*train\.jsonl: field '{field}' must hold "):
        to_examples(load_task(get_task(name), path)["train"], get_task(name))


def test_answers_from_csv_are_refused_in_a_sentence(write):
    path = write("train.csv", "context,question,answers\nIn Rome.,Where?,Rome\n")
    with pytest.raises(
        ValueError, match=r"Row 1 of .*train\.csv: field 'answers' must hold `text`"
    ):
        to_examples(load_task(get_task("squad"), path)["train"], get_task("squad"))
