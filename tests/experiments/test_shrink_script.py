"""The script behind the tables of small adapters in docs/alora.md: what it runs and writes."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from loralloc import AllocationConfig, get_method

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shrink():
    sys.path.insert(0, str(ROOT / "experiments"))
    yield importlib.import_module("shrink")
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture
def measured(shrink, tmp_path, monkeypatch):
    """Carries out cells whose losses and sizes are a function of arm, rate and seed."""

    def attempt(args, task, arm, rate, seed):
        path = args.out / shrink.name_of(args, task, arm, rate, seed)
        size = shrink.size_of(args, task, arm, seed)
        told = {"shrink": 1000 - seed + round(rate * 1e5), "rates": 900, "lora-8": 8000}.get(
            arm, size
        )
        best = {"shrink": 1e-3, "truncate": 1.0}.get(arm, 2e-3)
        loss = abs(rate - best) + seed
        data = dict(task=task, arm=arm, size=size, learning_rate=rate, seed=seed)
        data |= dict(parameters=told, dev_loss=loss, test_cross_entropy=loss + 0.5, steps=7)
        path.write_text(json.dumps(data))
        return True

    monkeypatch.setattr(shrink, "carry_out", attempt)
    return argparse.Namespace(out=tmp_path, seeds=[0, 1, 2])


def test_every_arm_is_searched_on_the_first_seed_alike(shrink, measured):
    for arm in shrink.ARMS:
        assert shrink.carry_out_arm(measured, "sst2", arm)
    names = {path.name for path in measured.out.glob("*.json")}
    assert {f"sst2-shrink-lr{rate}-seed0.json" for rate in ("0.0005", "0.001", "0.002")} <= names
    assert {f"sst2-shrink-lr0.001-seed{seed}.json" for seed in range(3)} <= names
    assert {f"sst2-lora-1100-lr{rate}-seed0.json" for rate in ("0.0005", "0.001")} <= names
    assert {f"sst2-lora-{1100 - seed}-lr0.002-seed{seed}.json" for seed in range(3)} <= names
    others = [name for name in names if "-shrink-" not in name and "-truncate-" not in name]
    assert len(others) == 4 * (3 + 1 + 2)  # one beyond the edge that the best is at
    assert len(names) == len(others) + (3 + 2) + (3 + shrink.MOST_WIDER + 2)


def test_what_fails_of_one_arm_keeps_no_other_back(shrink, measured, monkeypatch):
    made = shrink.carry_out
    monkeypatch.setattr(shrink, "carry_out", lambda *of: "random" not in of and made(*of))
    measured.arms = list(shrink.ARMS)
    assert not shrink.carry_out_task(measured, "sst2")
    there = {path.name.split("-")[1] for path in measured.out.glob("*.json")}
    assert there == {"shrink", "rates", "lora", "truncate"}


def test_a_table_has_every_arm_at_its_best_rate_and_leaves_other_sizes_out(shrink, measured):
    for arm in shrink.ARMS:
        shrink.carry_out_arm(measured, "sst2", arm)
    stray = dict(task="sst2", arm="lora", size=7, learning_rate=1e-4, seed=0, dev_loss=0.0)
    stray |= dict(parameters=7, test_cross_entropy=0.0)
    (measured.out / "sst2-lora-7-lr0.0001-seed0.json").write_text(json.dumps(stray))
    lines = shrink.tables(measured.out)
    assert lines[0] == "**sst2**, minilm-l6, 7 steps of 16 rows:"  # as they were run
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1] == (
        "| `shrink` from r = 8 | 0.001 | 1,100 1,099 1,098 | 0.5000 1.5000 2.5000 | 1.5000 |"
    )
    assert rows[4].startswith("| LoRA of that size | 0.002 | 1,100 1,099 1,098 |")
    assert rows[6].startswith("| twice that size, cut by singular values | 0.016 (edge) |")


def test_the_tables_in_the_docs_are_those_of_the_results(shrink):
    text = shrink.PAGE.read_text(encoding="utf-8")
    between = text.partition(shrink.BEGIN)[2].partition(shrink.END)[0]
    assert between.strip().split("\n") == shrink.tables(shrink.RESULTS)[:-1]


@pytest.mark.parametrize("arm", ["shrink", "rates", "lora-8", "lora", "random", "truncate"])
def test_every_arm_is_a_method_that_takes_its_options(arm, shrink, tmp_path):
    (tmp_path / "sst2").mkdir()
    args = argparse.Namespace(data=tmp_path, runs=tmp_path, steps=None, limit=None)
    made = shrink.cell(args, "sst2", arm, 1e-3, 0, None if arm not in shrink.SIZED else 82944)
    _takes(made.method, made.options)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("experiments/study/*.yaml")), ids=lambda p: p.stem
)
def test_every_row_of_the_study_is_a_method_that_takes_its_options(path):
    for row in yaml.safe_load(path.read_text(encoding="utf-8"))["methods"]:
        if isinstance(row, dict):
            _takes(row.get("method", "lora"), row.get("options", {}))


def _takes(method: str, options: dict) -> None:
    """The method is made, with what is for the allocation in it."""
    allocation = {
        name.removeprefix("allocation."): value
        for name, value in options.items()
        if name.startswith("allocation.")
    }
    if allocation:
        get_method(method)(allocation=AllocationConfig(**allocation))
