"""What a machine may do to a run, one case each; `experiments/machine.py` tries random moments."""

import os
import random
import shutil
import subprocess
import time

import pytest

from loralloc.training import seal as sealing
from loralloc.training.seal import newest_whole

SAVING = dict(save_strategy="steps", save_steps=4, save_total_limit=1)


@pytest.fixture
def at_a_checkpoint(monkeypatch):
    """Let something happen when the second checkpoint is sealed."""

    def arrange(what):
        own, seen = sealing.seal, []

        def seal(folder):
            seen.append(folder)
            if len(seen) == 2:
                what(folder)
            own(folder)

        monkeypatch.setattr(sealing, "seal", seal)

    return arrange


def mounted(*words) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.mark.parametrize("error", (Exception("No space left on device (os error 28)"), KeyError(1)))
def test_what_a_tokenizer_says_of_a_full_disk_is_no_traceback(error, call, monkeypatch):
    """tokenizers, written in Rust, raises the bare class; any other is our own bug."""

    def fail(args):
        raise error

    monkeypatch.setattr("loralloc.cli.tasks.run", fail)
    if type(error) is Exception:
        assert call("tasks").sentence == "No space left on device (os error 28)"
    else:
        with pytest.raises(KeyError):
            call("tasks")


@pytest.mark.reliability
def test_a_folder_that_is_deleted_under_a_run_ends_it_in_a_sentence(train, output, at_a_checkpoint):
    at_a_checkpoint(lambda folder: shutil.rmtree(output))
    assert "No such file or directory" in train(**SAVING).sentence
    assert not (output / "run.json").exists()


@pytest.mark.reliability
def test_a_folder_that_becomes_read_only_keeps_what_was_saved(train, output, at_a_checkpoint):
    def forbid(folder):
        mounted("--bind", output, output)
        mounted("-o", "remount,bind,ro", output)

    at_a_checkpoint(forbid)
    try:
        sentence = train(**SAVING).sentence
    finally:
        subprocess.run(["umount", output], check=False, capture_output=True)
    assert "Read-only file system" in sentence
    assert newest_whole(output).name == "checkpoint-4"


@pytest.mark.reliability
def test_a_full_disk_is_told_and_gone_on_from_when_there_is_room(train, output, call):
    output.mkdir()
    mounted("-t", "tmpfs", "-o", "size=100k", "tmpfs", output)
    try:
        assert "No space left on device" in train(**SAVING).sentence
        subprocess.run(["mount", "-o", "remount,size=64m", output], check=True)
        saved = newest_whole(output)
        if saved is None:
            done = train("--overwrite", **SAVING)
        else:
            done = call("train", "--resume", "--output_dir", output)
        assert (done.code, done.err) == (0, "")
    finally:
        subprocess.run(["umount", output], check=True)


@pytest.mark.reliability
def test_a_clock_that_jumps_changes_nothing_and_the_newest_checkpoint_stays(
    train, output, monkeypatch, tmp_path
):
    assert train(**SAVING).code == 0
    whole = (output / "adapter_model.safetensors").read_bytes()
    output.rename(tmp_path / "whole")
    draw, now, own = random.Random(0), time.time, sealing.seal

    def jumping():
        return now() + draw.uniform(-1e6, 1e6)

    def seal(folder):
        own(folder)
        os.utime(folder, (1e9 - sealing.step_of(folder),) * 2)  # each older than the one before

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(sealing, "seal", seal)
    assert train(**SAVING).code == 0
    assert (output / "adapter_model.safetensors").read_bytes() == whole
    assert newest_whole(output).name == "checkpoint-12"
