"""When a run writes into its folder: by the main process alone, once training has really begun."""

import json
import os
import shutil
import signal

import pytest
import torch
from trainers import Interrupted, KillAt
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from loralloc.runs import run as runs
from loralloc.runs.folder import LOCK
from loralloc.runs.stopping import StopOnSignal, Stopped
from loralloc.training.seal import newest_whole

OPTIONS = {
    "method": "lora",
    "lora_r": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 5,
    "use_cpu": True,
    "disable_tqdm": True,
}
"""12 steps of 6 an epoch."""

ROUNDS = {
    "method": "alora",
    "num_rounds": 2,
    "warmup_epochs": 0.5,
    "recovery_epochs": 0.5,
    "scoring_examples": 4,
}


@pytest.fixture
def options(tmp_path, write_rows, llama_folder):
    """Options of a small run, by name, with some changed."""
    rows = [{"prompt": f"the film {n} is", "completion": " good"} for n in range(32)]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:24])
    write_rows(tmp_path / "data" / "validation.jsonl", rows[24:])

    def options(**changes):
        where = {"dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
        return {**OPTIONS, **where, "model_name_or_path": llama_folder, **changes}

    return options


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def steps_in(folder):
    """The steps whose training loss the metrics hold."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def killed(options):
    """The options of a run that was killed at step 8, after the checkpoint of step 5."""

    def killed(**changes):
        run = runs.prepare(options(**changes))
        run.trainer.add_callback(KillAt(8))
        with pytest.raises(Interrupted):
            runs.train(run)
        return run.settings.output_dir

    return killed


@pytest.mark.reliability
@pytest.mark.parametrize(
    "changes", [dict(lora_r=4), dict(lora_r=4, lora_alpha=32), dict(warmup_epochs=1)], ids=str
)
def test_a_resume_that_is_refused_changes_nothing_in_the_folder(changes, options, killed):
    folder = killed(**ROUNDS)
    before = contents(folder)
    resumed = runs.prepare(options(**{**ROUNDS, **changes}), resume=True)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        runs.train(resumed)
    assert contents(folder) == before


@pytest.mark.reliability
def test_a_resumed_run_goes_on_with_its_metrics(options, killed):
    folder = killed()
    assert steps_in(folder) == list(range(1, 9))
    runs.train(runs.prepare(options(), resume=True))
    assert steps_in(folder) == list(range(1, 13))


@pytest.mark.reliability
def test_a_run_goes_on_with_the_data_it_began_with_or_by_force(options, killed, tmp_path):
    folder = killed()
    path = tmp_path / "data" / "train.jsonl"
    rows = path.read_text()
    first, rest = rows.split("\n", 1)
    path.write_text(rest + first + "\n")  # only the order is another
    with pytest.raises(ValueError, match=r"other data .*: the training examples differ; .*--force"):
        runs.prepare(options(), resume=True)
    assert runs.prepare(options(), resume=True, force=True).checkpoint == folder / "checkpoint-5"
    path.write_text(rows)
    assert runs.prepare(options(), resume=True).checkpoint == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="`force` lets a run be resumed"):
        runs.prepare(options(), overwrite=True, force=True)


def test_another_backbone_is_told_from_the_same(options, llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "copy")
    found = [
        runs.prepare(options(model_name_or_path=path, lora_r=rank)).inputs
        for path, rank in ((llama_folder, 2), (llama_folder, 3), (tmp_path / "copy", 2))
    ]
    assert found[0].keys() == {"train", "validation", "backbone"}
    assert found[0] == found[1]
    differs = {name for name in found[0] if found[0][name] != found[2][name]}
    assert differs == {"backbone"}


def test_nothing_is_overwritten_before_training_begins(options, killed):
    folder = killed()
    before = contents(folder)
    replacing = runs.prepare(options(max_steps=2), overwrite=True)
    assert contents(folder) == before
    runs.train(replacing)
    assert not (folder / "checkpoint-5").exists()
    assert json.loads((folder / "settings.json").read_text())["max_steps"]["value"] == 2


def test_only_the_main_process_writes(options, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    run = runs.prepare(options(save_strategy="no", save_steps=500))
    runs.train(run)
    assert run.trainer.state.global_step == 12
    assert not (tmp_path / "out").exists()


def test_preparing_leaves_no_folder_behind(options, tmp_path):
    runs.prepare(options())
    assert not (tmp_path / "out").exists()


class SignalAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def trained(run, *callbacks):
    for callback in callbacks:
        run.trainer.add_callback(callback)
    runs.train(run)
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


@pytest.mark.reliability
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(options, tmp_path):
    expected = trained(runs.prepare(options(output_dir=tmp_path / "whole")))
    before = signal.getsignal(signal.SIGTERM)
    stopping = StopOnSignal()
    with pytest.raises(Stopped, match="stopped at step 4"), stopping:
        trained(runs.prepare(options()), SignalAt(4), stopping)
    assert signal.getsignal(signal.SIGTERM) == before
    folder = tmp_path / "out"
    assert newest_whole(folder) == folder / "checkpoint-4"
    assert not json.loads((folder / "run.json").read_text())["ended"]
    assert trained(runs.prepare(options(), resume=True)) == pytest.approx(expected, abs=1e-6)
    assert json.loads((folder / "run.json").read_text())["ended"]


@pytest.mark.reliability
def test_a_folder_in_which_another_process_has_trained_meanwhile_is_refused(options, tmp_path):
    first, second = runs.prepare(options(max_steps=2)), runs.prepare(options(max_steps=2))
    trained(first)
    with pytest.raises(ValueError, match=r"Another process has trained in .* since"):
        trained(second)
    trained(runs.prepare(options(max_steps=4, save_steps=2), overwrite=True))
    resumed = runs.prepare(options(max_steps=4, save_steps=2), resume=True)
    (tmp_path / "out" / "checkpoint-4" / "files.json").unlink()
    with pytest.raises(ValueError, match=r"Another process has trained in .* since"):
        trained(resumed)
