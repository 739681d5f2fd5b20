"""The rows of a run: a task's Hub set divided as in the paper, a mixture as TRL divides it."""

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


@pytest.fixture
def mixture(tmp_path, write_rows, monkeypatch):
    """Load 200 rows as a mixture in YAML, with further lines."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_rows(tmp_path / "rows.jsonl", [{"content": f"film {i}"} for i in range(200)])

    def load(*lines, entry="path: json"):
        config = tmp_path / "mixture.yaml"
        first = [f"datasets:\n  - {entry}\n    data_files: {path}"]
        config.write_text("\n".join([*first, *lines]) + "\n")
        settings = resolve([], config=config)
        return data.with_validation(data.used(data.load(settings, None)), settings)

    return load


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["test_split_size: 0.5", "validation_examples: 20"], {"train": 100, "validation": 100}),
        (["test_split_size: 30"], {"train": 170, "validation": 30}),
        (["validation_examples: 20"], {"train": 180, "validation": 20}),
        (["test_split_size: 0.1", "dataset_test_split: test"], {"train": 180, "validation": 20}),
    ],
)
def test_a_mixtures_test_split_is_validated_on(lines, expected, mixture):
    assert {name: len(split.dataset) for name, split in mixture(*lines).items()} == expected


def test_a_mixture_is_divided_alike_whenever_it_is_loaded(mixture):
    first, second = (mixture("test_split_size: 0.5")["validation"].dataset[:] for _ in range(2))
    assert first == second


def test_a_mixtures_column_of_text_may_have_any_name(mixture):
    assert mixture("dataset_text_field: content")["train"].dataset.column_names == ["text"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["dataset_test_split: dev"], "`dataset_test_split` is 'dev', but a mixture has the split"),
        (["test_split_size: 300"], "test_size=300"),
    ],
)
def test_splits_that_a_mixture_cannot_have_are_refused(lines, words, mixture):
    with pytest.raises(ValueError, match=words):
        mixture(*lines)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("path: jsn", "The mixture in `datasets` cannot be loaded: "),
        ("path: json\n    split: dev", "The mixture in `datasets` cannot be loaded: "),
    ],
)
def test_a_mixture_that_cannot_be_loaded_is_told_in_a_sentence(entry, words, mixture):
    with pytest.raises(ValueError, match=words) as refused:
        mixture(entry=entry)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("entry", ("rows.jsonl", 5))
def test_an_entry_of_a_mixture_that_is_nothing_to_load(entry):
    with pytest.raises(ValueError, match="The mixture in `datasets` cannot be loaded: ") as refused:
        data.load(resolve({"datasets": [entry]}), None)
    assert "\n" not in str(refused.value)
