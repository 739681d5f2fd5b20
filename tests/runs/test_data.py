"""The rows of a run with a task: its own Hub set divided as in the paper, all else as it is."""

import pytest
from datasets import Dataset, DatasetDict

from loralloc.runs import data
from loralloc.runs.settings import resolve
from loralloc.tasks import source
from loralloc.tasks.catalog import get_task

RTE = {"sentence1": "It is wet.", "sentence2": "It rained.", "label": 1}


@pytest.fixture
def hub(monkeypatch):
    """40 rows to train on, 10 to develop, 5 whose labels are hidden, where the Hub is."""
    counts = {"train": (40, 1), "validation": (10, 1), "test": (5, -1)}
    splits = {
        name: Dataset.from_list([{**RTE, "label": label}] * count)
        for name, (count, label) in counts.items()
    }
    monkeypatch.setattr(source, "_load_from_hub", lambda *_: DatasetDict(splits))


def sizes(*flags):
    splits = data.load(resolve([*flags]), get_task("rte"))
    assert all(-1 not in split.dataset["label"][:] for split in splits.values())
    return {name: len(split.dataset) for name, split in splits.items()}


@pytest.mark.parametrize("flags", [(), ("--dataset_name", "nyu-mll/glue")])
def test_the_rule_divides_the_tasks_own_hub_set(hub, flags):
    assert sizes("--task", "rte", *flags) == {"train": 40, "validation": 5, "test": 5}


def test_splits_asked_for_by_name_are_not_divided(hub):
    names = ("--dataset_train_split", "train", "--dataset_test_split", "validation")
    assert sizes("--task", "rte", *names) == {"train": 40, "validation": 10}


def test_a_folder_is_not_divided(tmp_path, write_rows):
    write_rows(tmp_path / "train.jsonl", [RTE] * 4)
    write_rows(tmp_path / "dev.jsonl", [RTE] * 2)
    assert sizes("--task", "rte", "--dataset_name", str(tmp_path)) == {"train": 4, "validation": 2}
