"""The script behind docs/methods.md: what it runs next, what it keeps, and what it writes of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "experiments" / "method_runs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("method_runs", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["method_runs"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["method_runs"]


@pytest.fixture
def study(script, tmp_path):
    return script.Study(
        data=tmp_path, out=tmp_path / "runs", results=tmp_path / "results", steps=20, trials=3,
        seeds=(1, 2),
    )  # fmt: skip


def keep(study, row, rate, seed, *, tested, **result):
    path = study.kept("sst2", row, rate, seed, tested=tested)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"learning_rate": rate, **result}))


def left(script, study, row, **options):
    runs = script.missing(study, ["sst2"], [row], **{"retry": False, **options})
    return [(cell.learning_rate, cell.seed, cell.test is not None) for cell, _ in runs]


def test_the_search_comes_first_and_then_the_best_rate_with_every_seed(script, study):
    low, own, high = study.rates("sora")
    assert left(script, study, "sora") == [(rate, 0, False) for rate in (low, own, high)]
    keep(study, "sora", low, 0, tested=False, dev_loss=0.5)
    assert left(script, study, "sora") == [(own, 0, False), (high, 0, False)]
    keep(study, "sora", own, 0, tested=False, dev_loss=0.4)
    keep(study, "sora", high, 0, tested=False, failure="the loss is not finite")
    assert left(script, study, "sora") == [(own, 1, True), (own, 2, True)]
    assert left(script, study, "sora", retry=True)[0] == (high, 0, False)
    keep(study, "sora", own, 1, tested=True, test={"accuracy": 80.0})
    assert left(script, study, "sora") == [(own, 2, True)]


def test_where_every_run_of_a_search_failed_nothing_is_tested(script, study):
    for rate in study.rates("sora"):
        keep(study, "sora", rate, 0, tested=False, failure="the loss is not finite")
    assert left(script, study, "sora") == []
    assert study.tested("sst2", "sora") == []


def test_a_row_may_have_options_of_its_own(script, study):
    plain = study.cell("sst2", "adapterdrop", 1e-3, 1, tested=True)
    other = study.cell("sst2", "adapterdrop, no block dropped", 1e-3, 1, tested=True)
    assert (plain.method, other.method) == ("adapterdrop", "adapterdrop")
    assert other.options == {**plain.options, "method.dropped_at_test": 0}
    assert len({study.kept("sst2", row, 1e-3, 1, tested=True) for row in script.ROWS}) == len(
        script.ROWS
    )


def test_the_page_has_means_spreads_and_what_gates_did(script, study):
    assert "no results yet" in script.page(study)
    low, own, high = study.rates("sora")
    for rate, loss in ((low, 0.5), (own, 0.4), (high, 0.3)):
        keep(study, "sora", rate, 0, tested=False, dev_loss=loss)
    for seed, accuracy in ((1, 80.0), (2, 82.0)):
        keep(
            study, "sora", high, seed, tested=True, search_steps=0, seconds=10.0, steps=20,
            parameters={"stored": 990, "over_budget": -0.01},
            findings={"overlap_with_draw": 0.6},
            test={"accuracy": accuracy, "cross_entropy": 0.5},
        )  # fmt: skip
    (row,) = [line for line in script.page(study).splitlines() if line.startswith("| sora |")][:1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "sora", f"{high:g} (edge)", "81.0 ± 1.4", "0.5000 ± 0.0000", "990", "-1.0%", "-",
        "overlap with draw 0.600", "-",
    ]  # fmt: skip


def test_every_page_row_is_a_method_of_ours(script):
    from loralloc.methods.catalog import METHODS

    assert {method for method, _ in script.ROWS.values()} == set(METHODS) - {"pattern"}
