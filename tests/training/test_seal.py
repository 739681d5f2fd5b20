"""A checkpoint says whether it is whole, and the newest that is gets used."""

import json
import os

import pytest

from loralloc.training.seal import (
    SEAL,
    _rotate,
    check_whole,
    fault_of,
    newest_whole,
    seal,
    step_of,
)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-10"
    (folder / "inside").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "inside" / "weights").write_bytes(bytes(range(256)))
    seal(folder)
    return folder


def test_a_sealed_one_is_whole(checkpoint):
    assert fault_of(checkpoint) == ""
    assert set(json.loads((checkpoint / SEAL).read_text())) == {
        "trainer_state.json",
        "inside/weights",
    }
    seal(checkpoint)  # again, when it was written again
    assert fault_of(checkpoint) == ""


def test_any_flipped_bit_is_found(checkpoint):
    path = checkpoint / "inside" / "weights"
    whole = path.read_bytes()
    for place in (0, 100, 255):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert fault_of(checkpoint) == "inside/weights is not as it was written"


@pytest.mark.parametrize("length", [0, 1, 255])
def test_a_file_cut_short_is_found(length, checkpoint):
    path = checkpoint / "inside" / "weights"
    path.write_bytes(path.read_bytes()[:length])
    assert "inside/weights is not as it was written" in fault_of(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"bytes": "x", "sha256": 1}}'])
def test_a_seal_that_is_broken_is_told(text, checkpoint):
    (checkpoint / SEAL).write_text(text)
    assert fault_of(checkpoint) == f"its {SEAL} cannot be read"


def test_a_link_in_the_place_of_a_file_is_not_followed(checkpoint, tmp_path):
    path = checkpoint / "inside" / "weights"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert fault_of(checkpoint) == "it lacks inside/weights"


def test_the_newest_whole_one_is_used_and_the_others_named(checkpoint, tmp_path, caplog):
    assert newest_whole(tmp_path) == checkpoint
    for name in ("checkpoint-12", "checkpoint-14", "checkpoint-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-14" / SEAL).write_text("{")
    assert newest_whole(tmp_path) == checkpoint
    assert "checkpoint-12 is passed over: it lacks files.json" in caplog.text
    assert "checkpoint-14 is passed over: its files.json cannot be read" in caplog.text
    assert newest_whole(tmp_path / "nowhere") is None


def test_going_on_from_a_broken_one_is_refused(checkpoint):
    check_whole(checkpoint)
    (checkpoint / "inside" / "weights").write_bytes(b"")
    with pytest.raises(ValueError, match="is not as it was written; name an earlier"):
        check_whole(checkpoint)
    (checkpoint / SEAL).unlink()
    check_whole(checkpoint)  # of a trainer that nothing drove, as far as anyone can tell
    (checkpoint / "trainer_state.json").write_text("")
    with pytest.raises(ValueError, match=r"it lacks files\.json, which is written last"):
        check_whole(checkpoint)


@pytest.mark.parametrize(
    ("present", "limit", "best", "left"),
    [
        ([2, 4, 6], 2, None, [4, 6]),
        ([2, 4, 6], 1, "checkpoint-2", [2, 6]),
        ([2, 4, 6], None, None, [2, 4, 6]),
        ([2, 4, 6, 500], 2, None, [4, 6]),  # of an earlier run
        ([2, 6], 3, "checkpoint-99", [2, 6]),
    ],
)
def test_the_oldest_go_by_their_steps_whatever_the_clock_said(present, limit, best, left, tmp_path):
    for number, step in enumerate(present):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 - number,) * 2)  # set back again and again
    (tmp_path / "checkpoint-notes").mkdir()
    _rotate(tmp_path / "checkpoint-6", limit, best=best)
    found = sorted(step_of(p) for p in tmp_path.glob("checkpoint-[0-9]*"))
    assert found == left and (tmp_path / "checkpoint-notes").is_dir()


@pytest.mark.parametrize("name", ("../a", "/etc/passwd", "a/../../b"))
def test_a_list_of_files_elsewhere_is_no_list(name, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    listed = {name: {"bytes": 1, "sha256": "0"}}
    (tmp_path / "checkpoint-1" / "files.json").write_text(json.dumps(listed))
    assert "which is outside" in fault_of(tmp_path / "checkpoint-1")
