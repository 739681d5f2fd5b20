"""Several processes score each, and decide as one; a single one is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from loralloc.allocation import replicas
from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.policy import Plan, Scores, plan

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    # Gloo looks up the machine's own name otherwise, which not every machine resolves.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env={**os.environ, **loopback, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_know_of_each_other(seen):
    assert [each["count"] for each in seen] == [2, 2]


def test_scores_are_averaged_and_every_process_has_the_same(seen):
    first, second = (each["mean"] for each in seen)
    assert first == second
    assert first["terms"] == {"a": [1.0, 2.5], "b": [1.0]}
    assert first["dtypes"] == ["torch.float32"]
    assert first["rest"] == [-1.5, None, False]


def test_a_rank_is_verified_where_all_verified_it(seen):
    assert seen[0]["mean"]["verified"] == {"a": [1]}


def test_the_first_processs_plan_is_everyones(seen):
    assert [each["agreed"] for each in seen] == [[[0], 1, [1], 0]] * 2


def test_equal_adapters_pass(seen):
    assert [each["differences"]["none"] for each in seen] == [None, None]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a value", "lora_B of m"),
        ("a shape", "lora_A of m"),
        ("a state", "the optimiser's state of lora_A of m"),
    ],
)
def test_a_difference_stops_every_process_and_is_named(what, named, seen):
    for each in seen:
        words = f"After a round of allocation {named} is not the same in processes 0 and 1, so"
        assert each["differences"][what].startswith(words)


def test_what_is_shared_averaged_and_agreed_on(seen):
    first, second = (each["shared"] for each in seen)
    assert first["shared"] == second["shared"] == [0.0, 0.0]
    assert first["averaged"] == second["averaged"] == {"a": [0.5, 0.5]}
    assert first["gradient"] == second["gradient"] == [[1.0, 2.0], None]
    assert first["total"] == second["total"] == 3.0
    assert [first["weight"], second["weight"]] == [0.5, 1.5]  # of 1 and 3 things
    assert first["any"] == second["any"] == [True, False]
    assert first["agreed"] == second["agreed"] == "by 0"
    assert first["gathered"] == second["gathered"] == [0, 1]
    assert [first["first"], second["first"]] == [True, False]


def test_what_one_process_raises_all_raise(seen):
    first, second = (each["together"] for each in seen)
    assert [first["well"], second["well"]] == [0, 1]
    for where, words in (
        *(("in the first", "too small"), ("in the second", "too large")),
        ("unsendable", "odd"),
    ):
        assert first[where] == second[where] == words
    assert ["no 0" in first["all"], "no 1" in second["all"]] == [True, True]  # its own


def test_rounds_on_other_examples_give_one_adapter_and_one_record(seen):
    first, second = (each["rounds"] for each in seen)
    assert first["alone"] != second["alone"]
    assert first["record"] == second["record"]
    assert len(first["record"]["rounds"]) == 2
    mean = -(first["alone"] + second["alone"]) / 2
    assert first["record"]["rounds"][0]["s_full"] == pytest.approx(mean)


def test_adapters_that_have_grown_apart_stop_the_run(seen):
    words = "After a round of allocation lora_B of model.layers.0.self_attn.q_proj is not the same"
    assert all(each["rounds"]["differs"].startswith(words) for each in seen)


def test_what_one_process_cannot_measure_refuses_the_round_in_both(seen):
    for each in seen:
        assert "was refused and the model left as it was" in each["rounds"]["not finite"]


# One process.


def test_alone_nothing_happens():
    scores = Scores(terms={"share": {"a": torch.ones(2)}})
    decided = Plan(kept={"a": (0, 1)}, added={"a": 0}, pruned={})
    assert replicas.count() == 1
    assert replicas.mean(scores) is scores
    assert replicas.agreed(decided) is decided
    weight = torch.nn.Parameter(torch.ones(2, 2))
    assert replicas.check_equal({"a": (weight, weight)}, None) is None


def test_a_round_passes_through_the_seam_in_its_order(monkeypatch):
    passed = []

    def through(name):
        def step(value, *rest):
            passed.append((name, type(value).__name__))
            return value

        return step

    for name in ("mean", "agreed", "check_equal"):
        monkeypatch.setattr(replicas, name, through(name))
    model = tiny.adapted(tiny.llama())

    def policy(scores, limits):
        passed.append(("policy", type(scores).__name__))
        return plan(scores, limits)

    allocator = Allocator(model, AllocationConfig(), [tiny.batch_for(model)], policy=policy)
    monkeypatch.setattr(
        "loralloc.allocation.allocator.resize", lambda *_, **__: passed.append(("resize", ""))
    )
    allocator.step(None)
    assert passed == [
        ("mean", "Scores"),
        ("policy", "Scores"),
        ("agreed", "Plan"),
        ("resize", ""),
        ("check_equal", "dict"),
    ]
