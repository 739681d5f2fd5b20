"""A run deletes and overwrites what a run wrote, and nothing else."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from loralloc.runs import folder as run_folder
from loralloc.runs.folder import CLAIM, LOCK, REPLACED, check_free, claim, end, locked, set_aside

THEIRS = {
    "README.md": "mine",
    "checkpoint-500/notes": "mine",
    "eval/table": "mine",
    "answers.jsonl": "mine",
    "settings.json": "{}",
    "tokenizer.json": "{}",
}


HOLDING = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_with_files_of_somebody_elses_is_refused_and_left_alone(name, tmp_path):
    put(tmp_path, name, THEIRS[name])
    before = contents(tmp_path)
    top = name.partition("/")[0]
    for act in (check_free, claim):
        with pytest.raises(ValueError, match=rf"holds {top}, which no run of this version wrote"):
            act(tmp_path)
    if run_folder.holds_run(tmp_path):
        with pytest.raises(ValueError, match="no run of this version"):
            set_aside(tmp_path)
    else:
        set_aside(tmp_path)
    assert contents(tmp_path) == before


def test_names_that_no_run_uses_are_in_nobodys_way(tmp_path):
    for name in ("notes.txt", "checkpoint-notes/a", "checkpoint/b", "logs/c"):
        put(tmp_path, name, "mine")
    before = contents(tmp_path)
    claim(tmp_path)
    put(tmp_path, "metrics.jsonl", "{}")
    put(tmp_path, "checkpoint-4/weights", "")
    set_aside(tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_stays_until_the_one_that_replaces_it_has_ended(tmp_path):
    claim(tmp_path)
    put(tmp_path, "README.md", "first")
    end(tmp_path)
    set_aside(tmp_path)
    claim(tmp_path)
    put(tmp_path, "README.md", "second, cut short")
    set_aside(tmp_path)  # one more, in the place of the second
    assert (tmp_path / REPLACED / "README.md").read_text() == "first"
    assert not (tmp_path / "README.md").exists()
    claim(tmp_path)
    put(tmp_path, "README.md", "third")
    end(tmp_path)
    assert (tmp_path / "README.md").read_text() == "third" and not (tmp_path / REPLACED).exists()


def test_a_kill_while_a_run_is_set_aside_loses_nothing(tmp_path, monkeypatch):
    claim(tmp_path)
    for name in ("README.md", "settings.json", "metrics.jsonl"):
        put(tmp_path, name, name)
    end(tmp_path)
    rename, left = Path.rename, [2]

    def dying(path, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path)
    monkeypatch.undo()
    set_aside(tmp_path)
    kept = contents(tmp_path / REPLACED)
    assert {name: kept[name] for name in kept if name != CLAIM} == {
        name: name for name in ("README.md", "settings.json", "metrics.jsonl")
    }


def test_a_link_in_the_place_of_a_runs_folder_is_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    put(elsewhere, "keep", "mine")
    claim(folder)
    (folder / "checkpoint-4").symlink_to(elsewhere)
    (folder / "eval").symlink_to(elsewhere)
    set_aside(folder)
    assert contents(elsewhere) == {"keep": "mine"} and not (folder / "eval").exists()


def test_colleagues_may_read_all_of_a_run_or_nothing(tmp_path):
    claim(tmp_path)
    put(tmp_path, "adapter_model.safetensors", "").chmod(0o600)
    end(tmp_path)
    modes = {stat.S_IMODE(os.stat(path).st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    claim(tmp_path)
    words = [sys.executable, "-c", HOLDING, str(tmp_path / LOCK)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"trains in .* \(process {os.getpid()} on "):
            locked(tmp_path)
        other.kill()
    locked(tmp_path).release()  # a process that was killed holds nothing
    assert isinstance(locked(tmp_path), FileLock)


def test_what_a_kill_left_of_a_file_goes_and_nothing_like_it(tmp_path):
    claim(tmp_path)
    left = put(tmp_path, "settings.json.17.partial", "{")
    theirs = [put(tmp_path, name, "") for name in ("notes.17.partial", "settings.json.a.partial")]
    end(tmp_path)
    assert not left.exists() and all(path.exists() for path in theirs)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ended": 1', '"ended"', "null"])
def test_a_claim_that_is_broken_is_of_a_run_that_has_not_ended(text, tmp_path):
    (tmp_path / CLAIM).write_text(text)
    assert not run_folder.has_ended(tmp_path)
    (tmp_path / CLAIM).write_text(json.dumps({"ended": True}))
    assert run_folder.has_ended(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "adapter_model.safetensors", "README.md", CLAIM, LOCK, REPLACED, "eval"),
        *("checkpoint-4", "checkpoint-2/adapter_model.safetensors", "eval/a/predictions.jsonl"),
    ],
)
def test_nothing_is_written_through_a_link(name, tmp_path):
    folder, elsewhere = tmp_path / "run", put(tmp_path, "elsewhere", "mine")
    claim(folder)
    if name == CLAIM:
        (folder / CLAIM).unlink()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*elsewhere, so that what is wri"):
        locked(folder)
    assert elsewhere.read_text() == "mine"


def test_a_run_folder_itself_may_be_a_link(tmp_path):
    claim(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    locked(tmp_path / "run").release()
