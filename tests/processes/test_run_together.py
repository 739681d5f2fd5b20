"""`loralloc train` in two processes: one run folder, one voice, what one process comes to."""

import json
import shutil

import pytest
from together import assert_alike, start

QUICK = "alora,again"


@pytest.fixture(scope="session")
def place(tmp_path_factory, llama_folder, write_examples):
    """Makes a folder with a model and data for `run_together.train`."""

    def made():
        root = tmp_path_factory.mktemp("runs")
        shutil.copytree(llama_folder, root / "model")
        write_examples(root / "data")
        return root

    return made


@pytest.fixture(scope="module")
def quick(place):
    return start(f"run_together:{QUICK}", place(), (1, 2))


@pytest.fixture(scope="module")
def found(place):
    return start("run_together:alora,full", place(), (1, 2, 4))


@pytest.fixture(scope="module")
def resumed(place):
    root = place()
    start("run_together:saved", root, (1, 2))
    return start("run_together:goes on from 1,goes on from 2", root, (1, 2, 4))


def check(found, number, name):
    alone, (first, *others) = found[1][0][name], found[number]
    assert_alike({**first[name], "told": ""}, {**alone, "told": ""})
    assert [each[name]["told"]["code"] for each in found[number]] == [0] * number
    for each in others:
        assert each[name]["told"]["out"] == each[name]["told"]["err"] == ""
    said = " ".join(first[name]["told"]["out"].split())
    assert f"in {number} processes" in said
    assert said.count("step 8 ") == alone["told"]["out"].count("step 8 ")
    assert said.count("adapter:") == 1


def test_a_run_of_two_processes_comes_to_what_one_does_and_speaks_once(quick):
    check(quick, 2, "alora")


def test_a_folder_that_holds_a_run_is_refused_once(quick):
    both = [each["again"]["told"] for each in quick[2]]
    (sentence,) = [line for told in both for line in told["err"].splitlines()]
    assert "already holds a run" in sentence
    assert [told["code"] for told in both] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("number", (2, 4))
@pytest.mark.parametrize("name", ("alora", "full"))
def test_runs_of_several_processes_come_to_what_one_does(name, number, found):
    check(found, number, name)


@pytest.mark.slow
@pytest.mark.parametrize("number", (1, 2, 4))
@pytest.mark.parametrize("began", (1, 2))
def test_a_run_goes_on_with_any_number_of_processes(began, number, resumed):
    first, *others = (each[f"goes on from {began}"] for each in resumed[number])
    assert first["told"]["code"] == 0, first["told"]["err"]
    assert all(each["told"] == {"code": 0, "out": "", "err": ""} for each in others)
    assert_alike({**first, "told": ""}, {**resumed[1][0]["saved"], "told": ""})


def test_the_number_of_processes_is_kept(tmp_path):
    from loralloc.runs.folder import claim, claimed_processes, end

    claim(tmp_path, num_processes=3)
    end(tmp_path)
    assert claimed_processes(tmp_path) == 3
    data = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**data, "processes": "many"}))
    assert claimed_processes(tmp_path) == 1
