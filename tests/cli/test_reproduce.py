"""An experiment by command: planned, run, killed, run again."""

import json
import os
import signal
import subprocess
import sys

import pytest

MINE = """\
title: Two ways
kind: scores
backbones: {smoke: tiny-llama}
tasks: [sst2]
methods: [lora, sora]
settings: {max_steps: 6, eval_steps: 3, save_steps: 3, logging_steps: 3}
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "mine.yaml"
    path.write_text(MINE)
    return path


def command(mine, folder, *more):
    return ["reproduce", str(mine), "--scale", "smoke", "--output_dir", str(folder), *more]


def test_a_plan_shows_cells_and_time_and_runs_nothing(call, mine, tmp_path):
    answer = call(*command(mine, tmp_path, "--plan"))
    assert answer.code == 0
    assert "lora r=8 on sst2, learning rate 0.001, seed 0: " in answer.out
    assert "mine on tiny-llama: 2 cells, 0 finished, about " in answer.out
    assert "budgets in parameters: 8,704 (r=8)" in answer.out
    assert not (tmp_path / "cells").exists()


def test_a_plan_of_a_paper_table_counts_its_searches(call, tmp_path):
    words = command("table6", tmp_path, "--plan", "--terms", "fair")
    answer = call(*words)
    # 3 methods and LoRA at 4 ranks, on 3 tasks: 5 rates each, and 1 run at the best.
    assert "table6 on tiny-llama: 126 cells, 0 finished" in answer.out


def test_an_experiment_runs_and_leaves_its_report(call, mine, tmp_path):
    answer = call(*command(mine, tmp_path))
    assert answer.code == 0, answer.err
    assert "Two ways, on the paper's terms" in answer.out
    data = json.loads((tmp_path / "mine" / "report.json").read_text())
    assert [entry["method"] for entry in data["sections"][0]["entries"]] == ["lora", "sora"]
    assert data["remarks"] == []
    assert "| lora | 8,704 / 8,704 |" in (tmp_path / "mine" / "report.md").read_text()
    assert r"\begin{tabular}" in (tmp_path / "mine" / "report.tex").read_text()
    again = call(*command(mine, tmp_path))
    assert "2 cells, 2 finished" in again.out
    assert json.loads((tmp_path / "mine" / "report.json").read_text()) == data


def test_final_ranks_are_drawn_and_named(call, mine, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(mine.read_text().replace("scores", "ranks").replace("[lora, sora]", "[sora]"))
    answer = call(*command(own, tmp_path))
    assert answer.code == 0, answer.err
    files = ("report.md", "report.tex", "report.json", "own-paper.png", "own-paper.svg")
    assert f"report: {tmp_path / 'own'} ({', '.join(files)})" in answer.out
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == sorted(files)
    data = json.loads((tmp_path / "own" / "report.json").read_text())
    ranks = data["sections"][0]["entries"][0]["ranks"]["0"]
    assert set(ranks["initial"].values()) == {16}  # SoRA's gates: twice the budget
    assert sum(ranks["final"].values()) < sum(ranks["initial"].values())
    assert next(iter(ranks["initial"])).endswith("q_proj")  # in the model's order


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--executor", "poll"], "did you mean 'pool'?"),
        (["--seeds", "0"], "`--seeds` is 0"),
        (["--judge_url", "http://localhost:1/v1"], "given without `--judge_model`"),
        (["--workers", "0"], "`workers` is 0"),
        (["--data", "nowhere"], "`--data` is nowhere"),
    ],
)
def test_what_cannot_be_is_told_at_the_start(more, words, call, mine, tmp_path):
    assert words in call(*command(mine, tmp_path, *more)).sentence
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
@pytest.mark.reliability
def test_killed_and_started_again_it_gives_the_same_report(call, mine, tmp_path):
    def report(folder):
        return json.loads((folder / "mine" / "report.json").read_text())

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [sys.executable, "-m", "loralloc", *command(mine, killed)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = killed / "cells" / "tiny-llama" / "sst2"
    while not any(cells.glob("*/checkpoint-3")):
        with pytest.raises(subprocess.TimeoutExpired):  # it has not ended before its time
            process.wait(timeout=0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "mine").exists()
    for folder in (whole, killed):
        assert call(*command(mine, folder)).code == 0
    assert report(killed) == report(whole)
