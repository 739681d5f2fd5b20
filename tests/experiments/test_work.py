import json
from dataclasses import replace

import pytest
from transformers import TrainerCallback

from loralloc.experiments import work
from loralloc.experiments.cell import digest_of
from loralloc.experiments.executors.executor import Resources, get_executor
from loralloc.experiments.files import write_json
from loralloc.experiments.work import FAILURE, RESULT, TRAINED, attempt, finished

TIMES = ("seconds", "peak_bytes")


def without_times(result):
    """A result without what differs from run to run."""
    found = {name: value for name, value in result.items() if name not in (*TIMES, "cell")}
    test = {name: value for name, value in result["test"].items() if name != "seconds"}
    return {**found, "test": test}


def elsewhere(cell, root):
    return replace(cell, root=str(root))


@pytest.fixture(scope="module")
def never_stopped(lora_cells):
    return [attempt(cell) for cell in lora_cells]


def test_a_result_has_what_tables_are_made_of(never_stopped, lora_cells):
    result = never_stopped[0].result
    assert result == finished(lora_cells[0])
    assert (result["steps"], result["examples_per_step"]) == (4, 2)
    assert result["parameters"]["stored"] == result["parameters"]["budget"]
    assert set(result["ranks"]["final"].values()) == {8}
    test = result["test"]
    assert test["figures"][0]["name"] == "accuracy"
    assert test["num_examples"] == len(test["examples"]["scores"]) == 4
    losses = test["examples"]["losses"]
    assert len(losses) == 4
    assert min(losses) <= test["cross_entropy"] <= max(losses)


def test_a_finished_cell_is_not_run_again(never_stopped, lora_cells, monkeypatch):
    monkeypatch.setattr(work, "train_cell", lambda cell: pytest.fail("trained again"))
    again = attempt(lora_cells[0])
    assert not again.ran
    assert again.result == never_stopped[0].result


def test_a_cell_that_was_only_trained_is_tested_alone(lora_cells, tmp_path, monkeypatch):
    cell = elsewhere(lora_cells[0], tmp_path)
    assert attempt(cell.untested()).result["test"] is None
    assert finished(cell) is None
    monkeypatch.setattr(work, "train_cell", lambda cell: pytest.fail("trained again"))
    assert attempt(cell).result["test"]["num_examples"] == 4


def test_a_cell_that_was_tested_in_another_way_is_tested_again(lora_cells, tmp_path, monkeypatch):
    cell = elsewhere(lora_cells[0], tmp_path)
    fewer = replace(cell, test={**cell.test, "limit": 2})
    assert attempt(cell).result["test"]["num_examples"] == 4
    assert finished(fewer) is None
    monkeypatch.setattr(work, "train_cell", lambda cell: pytest.fail("trained again"))
    assert attempt(fewer).result["test"]["num_examples"] == 2
    assert finished(fewer) is not None


def test_questions_are_the_same_wherever_they_lie():
    here, there, others = ({"questions": f"{at}/q", "k": 1} for at in ("/a", "/b", "/c"))
    assert digest_of(here) == digest_of(there)
    assert digest_of({**others, "questions": "/c/p"}) != digest_of(here)


def test_a_run_that_is_replaced_is_not_taken_for_trained(lora_cells, tmp_path):
    cell = elsewhere(lora_cells[0], tmp_path)
    attempt(cell.untested())
    work.begin_cell(cell)
    assert not (cell.folder / TRAINED).exists()


class Killed(BaseException):
    """What no handler of errors holds up."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("step", (1, 3))
def test_a_cell_that_was_killed_ends_as_one_that_was_not(
    step, never_stopped, lora_cells, tmp_path, monkeypatch
):
    import loralloc

    cell = elsewhere(lora_cells[0], tmp_path)
    train = loralloc.train

    def train_and_die(run):
        run.trainer.add_callback(KillAt(step))
        train(run)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loralloc, "train", train_and_die, raising=False)
        attempt(cell)
    assert finished(cell) is None
    assert without_times(attempt(cell).result) == without_times(never_stopped[0].result)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("lost", ([RESULT], [RESULT, TRAINED]))
def test_what_was_not_written_is_found_again(lost, never_stopped, lora_cells, tmp_path):
    cell = elsewhere(lora_cells[0], tmp_path)
    first = attempt(cell)
    for name in lost:
        (cell.folder / name).unlink()
    again = attempt(cell)
    assert again.ran
    assert without_times(again.result) == without_times(first.result)


def test_a_cell_that_fails_says_why_and_is_tried_again(lora_cells, tmp_path):
    cell = elsewhere(lora_cells[0], tmp_path)
    bad = replace(cell, options={**cell.options, "learning_rate_typo": 1})
    outcome = attempt(bad)
    assert outcome.result is None
    assert "learning_rate_typo" in outcome.failure
    written = json.loads((bad.folder / FAILURE).read_text())
    assert written["reason"] == outcome.failure
    assert "Traceback" in written["traceback"]
    assert attempt(bad).ran


@pytest.mark.slow
@pytest.mark.reliability
def test_a_pool_gives_the_same_numbers(never_stopped, lora_cells, tmp_path):
    cells = [elsewhere(lora_cells[0], tmp_path), lora_cells[1]]
    found = list(get_executor("pool")(cells, Resources(workers=2)))
    assert {outcome.cell.seed: outcome.ran for outcome in found} == {0: True, 1: False}
    by_seed = {outcome.cell.seed: outcome.result for outcome in found}
    for outcome in never_stopped:
        assert without_times(by_seed[outcome.cell.seed]) == without_times(outcome.result)


def test_a_worker_that_dies_is_a_hole_and_the_rest_goes_on(lora_cells, tmp_path, monkeypatch):
    from loralloc.experiments.executors import pool

    cells = [elsewhere(cell, tmp_path) for cell in lora_cells]
    write_json(cells[1].folder / RESULT, {"cell": cells[1].anywhere(), "test": {}})
    monkeypatch.setattr(pool, "COMMAND", ("python3", "-c", "import os; os._exit(7)"))
    found = list(pool.run(cells, Resources(workers=2, retries=1)))
    assert [outcome.failure for outcome in found if outcome.result is None] == [
        "its process ended with exit code 7, 2 times"
    ]
    assert [outcome.cell for outcome in found if outcome.result] == [cells[1]]


def test_executors_are_found_by_name():
    with pytest.raises(ValueError, match="did you mean 'pool'"):
        get_executor("pol")
    with pytest.raises(ValueError, match="`workers` is 0; it must be at least 1"):
        Resources(workers=0)
