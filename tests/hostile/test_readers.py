"""Readers of strangers' files: a sentence or nothing, for whatever bytes make of whole files.

`experiments/fuzz.py` tries a million of each, led by what the code does with them.
"""

import socket
from pathlib import Path

import pytest
from hostile.inputs import made
from hostile.readers import TARGETS, fuzzed, nothing_outside, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent

KEPT = sorted([*HERE.glob("corpus/*/*"), *HERE.glob("found/*/*")])
"""Inputs that go different ways through the readers, and those that once were faults."""


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=40))
def test_whatever_bytes_make_is_refused_in_a_sentence(name, data, tmp_path):
    fuzzed(name, data, tmp_path)


@pytest.mark.parametrize("path", KEPT, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_found_new_ways_through_the_readers(path, tmp_path):
    fuzzed(path.parent.name, path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name, tmp_path):
    """The changes begin with what readers take, or they would try little."""
    target = TARGETS[name]
    for number, document in enumerate(target.whole):
        content = made(bytes([number]), target.whole)
        assert content.decode().startswith(("{", "[")), document
        target.read(tmp_path, content)


def test_the_watch_sees_what_is_written_elsewhere(tmp_path):
    (tmp_path / "in").mkdir()
    with nothing_outside(tmp_path / "in"):
        (tmp_path / "in" / "a").write_text("")
        with pytest.raises(AssertionError, match="was opened for writing"):
            (tmp_path / "b").write_text("")
        with pytest.raises(AssertionError, match=r"os\.remove"):
            (tmp_path / "b").unlink()
        with socket.socket() as one, pytest.raises(AssertionError, match=r"socket\.connect"):
            one.connect(("127.0.0.1", 9))


def test_what_is_no_sentence_is_seen():
    def raises(error):
        raise error

    for error in (ValueError("short"), UnicodeDecodeError("utf-8", b"", 0, 1, "a b c d")):
        with pytest.raises(AssertionError):
            refused(raises, error)
    with pytest.raises(KeyError):
        refused(raises, KeyError("a b c d"))
