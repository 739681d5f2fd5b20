import io
import json
import os
import signal
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from loralloc.allocation.record import Record
from loralloc.cli import main
from loralloc.runs import run as runs
from loralloc.runs.folder import LOCK


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


def test_a_run_from_flags(train, output):
    answer = train()
    assert (answer.code, answer.err) == (0, "")
    assert [entry.step for entry in Record.load(output).rounds] == [3, 6]
    assert (output / "adapter_model.safetensors").is_file()
    assert "2 rounds of 7 ranks, after steps 3, 6" in answer.out
    assert f"loralloc ranks {output}" in answer.out
    assert f"loralloc generate {output} --prompt" in answer.out


def test_rounds_that_are_spread_are_said_to_be_in_the_first_lines(train, output):
    lines = train(num_rounds=5).out.splitlines()
    note = "5 rounds need more than 2.5 epochs and the run has 2: 2 of them are spread over steps"
    (where,) = [number for number, line in enumerate(lines) if line.startswith(note)]
    assert lines[where - 1].endswith("2 rounds of 7 ranks, after steps 1, 7")
    assert where < next(n for n, line in enumerate(lines) if line.startswith("round 1"))
    assert Record.load(output).note == lines[where]


def test_a_run_that_shrinks_says_how_small_it_became(train, call, output):
    answer = train(
        *("--method", "shrink", "--target-parameters", "900", "--judging_examples", "4"),
        *("--num_rounds", "2"),
        **dict.fromkeys(("warmup_epochs", "recovery_epochs")),
    )
    assert (answer.code, answer.err) == (0, "")
    assert "2 rounds of an equal share, down to 900 parameters, after steps 6, 10" in answer.out
    assert answer.out.count("parameters: held-out loss") == 4
    size = Record.load(output).frontier[-1].parameters
    assert size <= 900
    sentence = f"; {size:,} are left: held-out loss"
    assert sentence in answer.out and sentence in (output / "README.md").read_text()
    assert sentence in call("ranks", output).out


def test_one_line_a_round_and_one_an_evaluation(train):
    lines = train().out.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert len(rounds) == 2
    for number, line in enumerate(rounds, start=1):
        assert line.startswith(f"round {number}")
        assert "pruned" in line and "given to" in line and line.rstrip().endswith(" s")
    assert "churn" not in rounds[0] and "churn" in rounds[1]
    assert sum("development loss" in line for line in lines) == 2


def test_a_round_stays_one_line_where_output_is_no_terminal(train, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rounds = [line for line in train().out.splitlines() if line.startswith("round ")]
    assert len(rounds) == 2
    assert all(line.rstrip().endswith(" s") for line in rounds)


def test_a_trl_yaml_with_an_allocation_block(call, tmp_path, data, output, llama_folder):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {llama_folder}\ndataset_name: {data}\noutput_dir: {output}\n"
        "use_peft: true\nlora_r: 2\nlora_alpha: 4\nlearning_rate: 1e-3\nnum_train_epochs: 2\n"
        "per_device_train_batch_size: 4\nlora_target_modules: [q_proj, v_proj]\n"
        "allocation:\n  num_rounds: 3\n  warmup_epochs: 0.5\n  recovery_epochs: 0.5\n"
        "  scoring_examples: 4\n"
    )
    answer = call("train", "--config", path, "--num_rounds", "2")
    assert (answer.code, answer.err) == (0, "")
    record = Record.load(output)
    assert [entry.step for entry in record.rounds] == [3, 6]
    assert len(record.initial_ranks) == 4
    settings = json.loads((output / "settings.json").read_text())
    assert settings["allocation.num_rounds"]["source"] == "flag"
    assert settings["allocation.warmup_epochs"]["source"] == f"file {path}"


def test_a_single_target_module(train, output):
    assert train(lora_target_modules="q_proj").err == ""
    names = Record.load(output).initial_ranks
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "q_proj"]


def test_what_already_holds_a_run_is_left_alone(train, output):
    assert train().code == 0
    before = contents(output)
    sentence = train().sentence
    assert f"{output} already holds a run" in sentence
    assert "`--resume`" in sentence and "`--overwrite`" in sentence
    assert contents(output) == before


def test_overwrite_replaces_the_run(train, output):
    train(save_steps=5, save_strategy="steps", save_total_limit=9)
    (output / "notes.txt").write_text("mine")
    answer = train("--overwrite", num_rounds=1)
    assert answer.code == 0
    assert len(Record.load(output).rounds) == 1
    assert (output / "metrics.jsonl").read_text().count('"round"') == 1
    assert (output / "notes.txt").read_text() == "mine"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-12"]


def test_overwriting_with_bad_input_loses_nothing(train, output):
    train()
    before = contents(output)
    assert "min_rank" in train("--overwrite", min_rank=9).sentence
    assert contents(output) == before


def test_overwriting_what_holds_no_run(train):
    assert train("--overwrite").code == 0


class _Kill(TrainerCallback):
    """Ends the process's work after the checkpoint of step 5, as a signal would."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 8:
            raise KeyboardInterrupt


@pytest.fixture
def killed(train, monkeypatch, output):
    """A run that was interrupted at step 8."""
    prepare = runs.prepare

    def prepare_to_be_killed(*args, **options):
        prepared = prepare(*args, **options)
        prepared.trainer.add_callback(_Kill())
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(runs, "prepare", prepare_to_be_killed)
        answer = train(save_strategy="steps", save_steps=5)
    assert answer.code == 130
    go_on = f"Go on from checkpoint-5 with: loralloc train --resume --output_dir {output}"
    assert answer.err.split("\n") == ["", go_on, "loralloc: interrupted", ""]


@pytest.mark.reliability
def test_resume_continues_the_run_with_its_options(killed, train, call, output, tmp_path):
    assert not (output / "adapter_model.safetensors").exists()
    answer = call("train", "--resume", "--output_dir", output)
    assert (answer.code, answer.err) == (0, "")
    whole = tmp_path / "whole"
    train(output_dir=whole, save_strategy="steps", save_steps=5)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, output)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
    assert Record.load(output).ranks == Record.load(whole).ranks
    settings = json.loads((output / "settings.json").read_text())
    assert settings["num_rounds" if "num_rounds" in settings else "allocation.num_rounds"] == {
        "value": 2,
        "source": "earlier run",
    }


@pytest.mark.reliability
def test_resuming_with_another_rank_is_refused(killed, call, output):
    before = contents(output)
    answer = call("train", "--resume", "--output_dir", output, "--lora_r", "4")
    assert "lora_r" in answer.sentence or "rank" in answer.sentence
    assert contents(output) == before


def test_a_method_without_rounds_is_trained_resumed_and_shown(call, data, output, llama_folder):
    words = ("--dataset_name", data, "--model_name_or_path", llama_folder, "--method", "houlsby")
    every = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    answer = call("train", *words, "--output_dir", output, *every)
    assert (answer.code, answer.err) == (0, "")
    assert "houlsby with bottleneck" in answer.out
    assert "ranks" not in answer.out
    assert not (output / "allocation.json").exists()
    weights = load_file(output / "adapter_model.safetensors")
    resumed = call("train", "--resume", "--output_dir", output)
    assert (resumed.code, resumed.err) == (0, "")
    torch.testing.assert_close(load_file(output / "adapter_model.safetensors"), weights)
    refused = call("train", "--resume", "--output_dir", output, "--method", "bitfit")
    assert "is of the method houlsby, not of bitfit" in refused.sentence


def test_resuming_where_there_is_no_run(train, output):
    assert "so there is no run to resume; leave out `--resume`" in train("--resume").sentence
    assert not output.exists()


def test_resuming_before_the_first_checkpoint(train, output):
    train(save_strategy="no")
    before = contents(output)
    sentence = train("--resume").sentence
    assert "has no whole checkpoint yet, so there is nothing to resume" in sentence
    assert "`--overwrite`" in sentence
    assert contents(output) == before


def test_resuming_a_finished_run_changes_no_weight(train, call, output):
    train()
    before = load_file(output / "adapter_model.safetensors")
    answer = call("train", "--resume", "--output_dir", output)
    assert answer.code == 0
    torch.testing.assert_close(load_file(output / "adapter_model.safetensors"), before)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_reason(train, output):
    sentence = train(learning_rate="1e38").sentence
    assert "Round 1 at step 3 was refused and the model left as it was" in sentence
    assert "lower the learning rate or check the data" in sentence
    assert not (output / "adapter_model.safetensors").exists()


def test_an_error_on_a_terminal_leaves_it_as_it_was(train_words, monkeypatch, capfd):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("loralloc.cli.train.Console", lambda **_: console)
    streams = sys.stdout, sys.stderr
    try:
        assert main(train_words(learning_rate="1e38")) == 2
        assert (sys.stdout, sys.stderr) == streams
    finally:
        sys.stdout, sys.stderr = streams
    hides, shows = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().count(hides) == screen.getvalue().count(shows)
    assert "loralloc: error: Round 1" in capfd.readouterr().err


def test_debug_shows_the_traceback(train_words, call):
    words = train_words(min_rank=9)
    with pytest.raises(ValueError, match="min_rank"):
        call("--debug", *words)


def test_a_bug_of_ours_is_no_bad_input(train, monkeypatch):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(runs, "prepare", broken)
    with pytest.raises(KeyError):
        train()


def test_all_flags_are_listed(call):
    answer = call("train", "--help-all")
    assert answer.code == 0
    for flag in ("--allocation.num_rounds", "--learning_rate", "--lora_r", "--task"):
        assert flag in answer.out
    assert "  --learning_rate  [0.0002]\n        Highest learning rate." in answer.out
    assert "  --gradient_checkpointing  [false]\n" in answer.out


def test_a_run_that_the_system_ends_saves_and_says_how_to_go_on(train, output, monkeypatch):
    own = runs.train

    def ended(run):
        class Ending(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

        run.trainer.add_callback(Ending())
        own(run)

    monkeypatch.setattr(runs, "train", ended)
    answer = train()
    assert answer.code == 0, answer.err
    assert "Stopped at step 5, as asked." in answer.out
    assert f"loralloc train --resume --output_dir {output}" in answer.out
    monkeypatch.undo()
    assert train("--resume").code == 0
