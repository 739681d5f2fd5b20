"""`loralloc search`: the answer, and nothing else."""

import json
import re

import pytest
import yaml

from loralloc.allocation.shrinking import Difference
from loralloc.runs import search as searching
from loralloc.runs.search import ANSWER, FILES, Doubling


@pytest.fixture
def search(call, data, output, llama_folder):
    def search(*flags):
        options = {
            "dataset_name": data,
            "model_name_or_path": llama_folder,
            "output_dir": output,
            "lora_r": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "scoring_examples": 4,
            "judging_examples": 4,
            "tolerance": 9.0,
            "num_rounds": 2,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return call("search", "--steps", "12", *words, *flags)

    return search


def test_it_prints_and_writes_the_answer_and_keeps_no_run(search, output):
    answer = search()
    assert (answer.code, answer.err) == (0, "")
    assert re.search(r"r = 2 everywhere was [\d,]+ parameters; [\d,]+ do as well here", answer.out)
    assert re.search(r"r = 4 instead of 2 would (buy|cost) [\d.]+ ± [\d.]+ of the held", answer.out)
    assert sorted(path.name for path in output.iterdir()) == sorted([*FILES, ANSWER])
    found = json.loads((output / ANSWER).read_text())
    peft = json.loads((output / "peft.json").read_text())
    assert peft["target_modules"] == list(found["ranks"])
    assert yaml.safe_load((output / "axolotl.yaml").read_text())["lora_r"] == peft["r"]
    smallest = found["frontier"][-1]
    assert sum(found["ranks"].values()) == smallest["ranks"] < 0.75 * 28
    assert found["doubling"]["rank"] == 2 and found["doubling"]["difference"]["mean"] != 0
    for name in FILES:
        assert str(output / name) in answer.out
    assert f"holds a {next(iter(FILES))} already" in search("--no-doubling").sentence


def test_the_runs_beside_it_can_be_left_out(search, output):
    answer = search("--no-doubling")
    assert answer.code == 0 and "instead of" not in answer.out
    assert json.loads((output / ANSWER).read_text())["doubling"] is None


def test_what_was_found_is_kept_where_the_runs_beside_it_fail(search, output, monkeypatch):
    def failing(*_):
        raise ValueError("the runs beside it failed")

    monkeypatch.setattr(searching, "_doubling", failing)
    assert "the runs beside it failed" in search().sentence
    assert json.loads((output / ANSWER).read_text())["doubling"] is None


def test_a_folder_of_a_run_is_left_alone(search, output):
    output.mkdir()
    (output / "settings.json").write_text("{}")
    assert "holds a settings.json already" in search().sentence
    assert [path.name for path in output.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "sora"), "`method` is 'sora', but a search shrinks LoRA; leave it out"),
        (("--steps", "1"), "`--steps` is 1; it must be at least 2"),
        (("--max_steps", "8"), "each run of a search takes `--steps`; give that"),
        (("--ranks_per_round", "3"), "`ranks_per_round` is 3, which shrinking does not read"),
    ],
)
def test_what_it_cannot_do_is_refused(flags, words, search):
    assert words in search(*flags).sentence


@pytest.mark.parametrize(
    ("mean", "words"),
    [(-0.02, "would buy 0.0200 ± 0.0010"), (0.03, "would cost 0.0300 ± 0.0010")],
)
def test_what_doubling_buys_is_said_with_its_sign(mean, words):
    found = Doubling(rank=8, parameters=1000, loss=1.5, difference=Difference(mean, 0.001))
    assert f"r = 16 instead of 8 {words} of the held-out loss of 1.5000" in found.in_words()
    assert "1,000 parameters more" in found.in_words()
