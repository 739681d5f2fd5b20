"""Splits from a file, a folder, the embedded demo and the Hub, and every way to find none."""

from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from loralloc.tasks.source import load_splits

ROW = {"text": "a"}


@pytest.fixture
def hub(monkeypatch):
    """Put a data set, or an error, where the Hub would be; record what it is asked for."""
    asked = []

    def put(answer):
        def load_dataset(*names):
            asked.append(names)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return put


def test_a_file_becomes_the_train_split(write):
    path = write("mine.JsonL", [ROW])
    for given in (path, str(path)):
        splits = load_splits(given)
        assert list(splits) == ["train"]
        assert splits["train"].name == "train"
        assert splits["train"].source == str(path)
        assert splits["train"].dataset.to_list() == [ROW]


def test_a_path_may_begin_with_the_users_home(write, monkeypatch, tmp_path):
    write("mine.jsonl", [ROW])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_splits("~/mine.jsonl")["train"].dataset.to_list() == [ROW]


@pytest.mark.parametrize("spelling", ["validation", "valid", "val", "dev"])
def test_a_folder_gives_the_splits_it_has_in_a_fixed_order(write, tmp_path, spelling):
    write("set/test.csv", "text\nc\n")
    write(f"set/{spelling}.json", '[{"text": "b"}]')
    write("set/train.JSONL", [ROW])
    write("set/README.md", "not read")
    write("set/extra.jsonl", "not read either")
    splits = load_splits(tmp_path / "set")
    assert [(name, split.name) for name, split in splits.items()] == [
        ("train", "train"),
        ("validation", "validation"),
        ("test", "test"),
    ]
    assert [split.dataset["text"][:] for split in splits.values()] == [["a"], ["b"], ["c"]]
    assert splits["validation"].source == str(tmp_path / "set" / f"{spelling}.json")


def test_splits_can_be_chosen_by_their_own_name(write, tmp_path):
    write("set/train.jsonl", [ROW])
    write("set/first_half.jsonl", [{"text": "h"}])
    splits = load_splits(tmp_path / "set", split_names={"validation": "first_half"})
    assert list(splits) == ["validation"]
    assert splits["validation"].dataset["text"][:] == ["h"]


def test_the_demo_is_embedded():
    splits = load_splits("demo")
    assert {name: len(split.dataset) for name, split in splits.items()} == {
        "train": 1000,
        "validation": 100,
        "test": 100,
    }
    assert splits["test"].source == "demo, split test"
    assert splits["test"].dataset.column_names == ["prompt", "completion", "references"]
    assert list(load_splits("demo", split_names={"test": "validation"})) == ["test"]


def test_a_folder_called_demo_is_reached_by_its_path(write, tmp_path, monkeypatch):
    write("demo/train.jsonl", [ROW])
    monkeypatch.chdir(tmp_path)
    for given in ("./demo", Path("demo")):
        assert load_splits(given)["train"].dataset.to_list() == [ROW]
    assert len(load_splits("demo")["train"].dataset) == 1000


def test_the_hub_gives_the_same_splits_as_a_folder(hub, write, tmp_path):
    rows = Dataset.from_list([ROW])
    asked = hub(DatasetDict({"test": rows, "dev": rows, "train": rows, "unsupervised": rows}))
    splits = load_splits("someone/something", config="small")
    assert asked == [("someone/something", "small")]
    assert list(splits) == ["train", "validation", "test"]
    assert splits["validation"].source == "someone/something (small), split dev"
    assert splits["validation"].dataset.to_list() == [ROW]
    chosen = load_splits("something", split_names={"train": "unsupervised"})
    assert chosen["train"].source == "something, split unsupervised"


def refuses(*args, **options):
    with pytest.raises(ValueError) as caught:
        load_splits(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    return message


def test_a_name_that_is_nowhere_offline_names_the_demo():
    message = refuses("nobody/nothing")
    assert "no file or folder 'nobody/nothing'" in message
    assert "the Hub cannot be reached" in message
    assert "'demo'" in message


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "./data", "../data", "a/b/c", "set/TRAIN.CSV", Path("gone/x.json")]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(hub, name, tmp_path, monkeypatch):
    asked = hub(AssertionError("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    assert refuses(name) == f"There is no file or folder '{name}'."
    assert asked == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DatasetNotFoundError("a"), "the Hub has no data set of that name"),
        (ConnectionError("a"), "the Hub cannot be reached"),
        (
            ValueError("Config name is missing.\nPick one"),
            "cannot be loaded: Config name is missing.",
        ),
        (RuntimeError("Scripts are not supported."), "cannot be loaded: Scripts are not"),
        (RuntimeError(), "cannot be loaded: RuntimeError."),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(hub, error, words):
    hub(error)
    message = refuses("someone/something")
    assert words in message
    assert "someone/something" in message


def test_a_file_of_another_type_is_refused(write):
    path = write("rows.txt", "a")
    message = refuses(path)
    assert (
        message == f"{path} cannot be read: its name ends in none of .json, .jsonl, .csv, .parquet."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.jsonl", ""),
        ("e.jsonl", "\n"),
        ("e.json", "[]"),
        ("e.csv", ""),
        ("e.csv", "text,label\n"),
    ],
)
def test_an_empty_split_is_refused(write, name, content):
    path = write(name, content)
    assert refuses(path) == f"The train split is empty: {path} has no rows."


def test_an_empty_split_of_a_folder_is_named(write, tmp_path):
    write("set/train.jsonl", [ROW])
    path = write("set/dev.jsonl", "")
    assert refuses(tmp_path / "set") == f"The validation split is empty: {path} has no rows."


def test_an_empty_split_of_the_hub_is_named(hub):
    hub(DatasetDict({"train": Dataset.from_dict({"text": []})}))
    message = refuses("someone/it")
    assert message == "The train split is empty: someone/it, split train has no rows."


def test_a_folder_without_splits_says_what_it_has(write, tmp_path):
    write("set/part1.jsonl", [ROW])
    message = refuses(tmp_path / "set")
    assert f"The folder {tmp_path / 'set'} has no split named train, validation or test" in message
    assert "found: part1" in message
    (tmp_path / "bare").mkdir()
    assert "found: nothing to read" in refuses(tmp_path / "bare")


@pytest.mark.parametrize("second", ["train.csv", "train.json"])
def test_two_files_for_one_split_are_refused(write, tmp_path, second):
    write("set/train.jsonl", [ROW])
    write(f"set/{second}", "text\na\n")
    message = refuses(tmp_path / "set")
    assert "several train splits" in message
    assert "train.jsonl" in message
    assert second in message


def test_parts_of_a_split_are_joined_in_order(write, tmp_path):
    for number in (1, 0):
        write(f"train-0000{number}-of-00002.jsonl", [{"text": f"{number}{n}"} for n in range(2)])
    write("test.jsonl", [ROW])
    splits = load_splits(tmp_path)
    assert list(splits) == ["train", "test"]
    assert splits["train"].dataset["text"][:] == ["00", "01", "10", "11"]
    assert splits["train"].source == f"{tmp_path} (train-00000-of-00002.jsonl and 1 more)"


def test_parts_that_are_missing_or_differ_are_refused(write, tmp_path):
    write("train-00000-of-00002.jsonl", [ROW])
    with pytest.raises(ValueError, match="has 1 of the 2 files of which train-00000-of-00002"):
        load_splits(tmp_path)
    write("train-00001-of-00002.jsonl", [{"other": "a"}])
    with pytest.raises(ValueError, match="has the columns other, and train-00000-of"):
        load_splits(tmp_path)


def test_a_split_in_one_file_and_in_parts_is_refused(write, tmp_path):
    write("train.jsonl", [ROW])
    write("train-00000-of-00001.jsonl", [ROW])
    with pytest.raises(ValueError, match="several train splits"):
        load_splits(tmp_path)


def test_two_spellings_of_one_split_are_refused_unless_one_is_named(write, tmp_path):
    write("set/dev.jsonl", [ROW])
    write("set/val.jsonl", [{"text": "v"}])
    assert "several validation splits" in refuses(tmp_path / "set")
    chosen = load_splits(tmp_path / "set", split_names={"validation": "val"})
    assert chosen["validation"].dataset["text"][:] == ["v"]


def test_a_split_asked_for_must_be_there(write):
    path = write("rows.jsonl", [ROW])
    message = refuses(path, split_names={"train": "train", "validation": "held_out"})
    assert message == f"The file {path} has no split 'held_out'; found: train."
    assert "demo set has no split 'dev'; found: train, validation, test" in refuses(
        "demo", split_names={"validation": "dev"}
    )


def test_an_unknown_split_key_is_refused():
    assert "unknown key 'dev'" in refuses("demo", split_names={"dev": "validation"})


def test_a_configuration_without_a_hub_is_refused(write):
    path = write("rows.jsonl", [ROW])
    assert "the configuration 'sst2' has no meaning" in refuses(path, config="sst2")
    assert "'demo' is not on the Hub" in refuses("demo", config="sst2")
