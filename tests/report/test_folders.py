import json
from pathlib import Path

import pytest
from run_folders import SIZES, make_allocation, make_run

from loralloc.report.folders import find_runs, read_run, read_runs, shown


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", figures={"accuracy": 71.5}, frontier=SIZES)


def test_a_run_is_read(run: Path) -> None:
    found = read_run(run, name="mine")
    assert found.settings["method"] == "alora" and found.settings["lora_r"] == 4
    assert found.curve("eval_loss") == ([10, 20], [0.55, 0.525])
    assert found.figures == {"sst2-test-beam5 accuracy": 71.5}
    assert found.parameters == 2 * 4 * 8
    assert found.moves is not None and len(found.moves.rounds) == 4
    assert [(size.parameters, size.kept) for size in found.frontier] == [
        (4000, True),
        (2000, True),
        (900, False),
    ]


def test_a_run_of_another_method_moved_no_ranks(tmp_path: Path) -> None:
    found = read_run(make_run(tmp_path / "run", method="houlsby"), name="mine")
    assert found.allocation is None and found.moves is None and not found.frontier


def test_a_run_that_is_not_finished_is_read_as_far_as_it_is(run: Path) -> None:
    (run / "adapter_model.safetensors").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "lo')
    found = read_run(run, name="mine")
    assert found.parameters is None
    assert found.log[-1]["train_runtime"] == 12


def test_what_is_no_number_is_left_out(run: Path) -> None:
    entry = '{"step": 4, "loss": NaN, "grad_norm": Infinity, "note": "1", "flag": true, "x": 1}\n'
    (run / "metrics.jsonl").write_text(entry)
    assert read_run(run, name="mine").log == [{"step": 4, "x": 1}]


def test_runs_below_a_folder_are_found_once_and_checkpoints_are_none(tmp_path: Path) -> None:
    for name in ("b", "a/c"):
        make_run(tmp_path / name)
    make_run(tmp_path / "b" / "checkpoint-20")
    make_run(tmp_path / "checkpoint-9")
    found = find_runs([tmp_path, tmp_path / "b"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c", "b"]


def test_the_best_of_a_sweep_is_one_of_its_cells(tmp_path: Path) -> None:
    make_run(tmp_path / "cells" / "a")
    make_run(tmp_path / "best")
    (tmp_path / "sweep.json").write_text("{}")
    assert find_runs([tmp_path]) == [tmp_path / "cells" / "a"]
    assert find_runs([tmp_path / "best"]) == [tmp_path / "best"]


def test_long_names_that_differ_at_their_ends_are_told_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"{'long-' * 14}seed{seed}", seed=seed)
        make_run(tmp_path / f"seed{seed}{'-long' * 14}", seed=seed)
    names = [run.name for run in read_runs([tmp_path])]
    assert len(set(names)) == 4 and max(map(len, names)) <= 64
    assert names[0].endswith("long-seed0") and names[2].startswith("3: …")


def test_what_was_measured_without_a_task_is_read_and_of_how_many(run: Path) -> None:
    place = run / "eval" / "data-test"
    place.mkdir(parents=True)
    numbers = {"loss": 0.5, "accuracy": 0.75, "num_examples": 10, "num_in_split": 40}
    (place / "eval.json").write_text(json.dumps(numbers))
    figures = read_run(run, name="mine").figures
    assert figures["data-test (first 10) loss"] == 0.5
    assert figures["data-test (first 10) accuracy"] == 75


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name in ("one/x", "two/x"):
        make_run(tmp_path / name)
    assert [run.name for run in read_runs([tmp_path])] == ["one/x", "two/x"]
    assert [run.name for run in read_runs([tmp_path / "one"])] == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("settings.json", "{", r"settings.json cannot be read as JSON"),
        ("settings.json", "[]", "settings.json holds a list and no object"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl holds a line without a step"),
        ("metrics.jsonl", "x\n", "metrics.jsonl holds a line that is not JSON"),
        ("allocation.json", '{"version": 9}', "has version 9"),
        ("adapter_model.safetensors", "x" * 40, "is not a file of safetensors"),
        ("eval/sst2-test-beam5/eval.json", "?", "eval.json cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, text: str, words: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_run(run, name="mine")


@pytest.mark.parametrize(
    "change",
    [
        {"pruned": {"model.layers.0.self_attn.q_proj": [99]}},
        {"pruned": {"nothing": [0]}},
        {"added": {}},
        {"added": None},
        {"terms": {"without": {"model.layers.0.self_attn.q_proj": [0.1]}}},
        {"seconds": "1"},
        {"churn": float("nan")},
    ],
)
def test_rounds_that_no_run_writes_are_refused(run: Path, change: dict) -> None:
    data = make_allocation()
    data["rounds"][1].update(change)
    (run / "allocation.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"Round 2 of allocation\.json is not as rounds"):
        read_run(run, name="mine")


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match="is not a folder"):
        find_runs([tmp_path / "nothing"])


def test_a_string_is_shown_on_one_line_without_control_characters() -> None:
    assert shown("a\nb\x1b[31m\x00") == "a b\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"
    assert len(shown("x" * 500)) == 60
