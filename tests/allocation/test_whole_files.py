"""A file is replaced whole or stays as it was; one that is read is named where it is broken."""

import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from loralloc.allocation.files import MOST_JSON_BYTES, read_json, read_tensors, write_text


def test_it_is_written_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one\n", "ü two\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match="large"):
            write_text(path, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "before\n" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"cannot be read as JSON \(Expecting value"),
        ('{"a": 1', "cannot be read as JSON"),
        ('{"a": 1, "a": 2}', r"\('a' is there twice\)"),
        ("[1]", "holds a list and no object"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
    ids=["empty", "cut", "twice", "list", "deep"],
)
def test_json_that_is_broken_is_named(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        for read in (read_json, read_tensors):
            with pytest.raises(ValueError, match="is not there, or no file"):
                read(tmp_path / name)


def test_json_without_end_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("w") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="has 268,435,457 bytes, and no run writes over"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_tensors_that_are_cut_short_are_named(kept, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(64.0)}, path)
    assert torch.equal(read_tensors(path)["a"], torch.arange(64.0))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read .* it was cut short"):
        read_tensors(path)
