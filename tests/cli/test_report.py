import json
from pathlib import Path

import pytest

from loralloc.cli import report
from loralloc.report.page import FORMATS, PAGE


@pytest.fixture
def trained(train, output) -> Path:
    assert train().code == 0
    return output


def test_a_run_becomes_a_page_figures_and_tables(trained, call, tmp_path) -> None:
    out = tmp_path / "[red]report"
    answer = call("report", trained, "--out", out, "--format", "html", "svg", "markdown")
    assert (answer.code, answer.err) == (0, "")
    html = (out / PAGE).read_text()
    assert "alora" in html and "Where the ranks went" in html
    assert "| out | alora |" in (out / "results.md").read_text()
    assert (out / "run-1-scores-without.svg").is_file() and (out / "churn.svg").is_file()
    lines = answer.out.splitlines()
    assert lines[0].endswith("files on 1 run:")
    assert sorted(lines[1:]) == sorted(map(str, out.iterdir()))


def test_every_form_can_be_asked_for() -> None:
    assert report.FORMATS == FORMATS


def test_bad_input_is_told_in_a_sentence(call, tmp_path) -> None:
    assert "holds no run" in call("report", tmp_path).sentence
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert "names a folder" in call("report", tmp_path, "--out", tmp_path / "file").sentence
    (tmp_path / "settings.json").write_text("?")
    assert "settings.json cannot be read as JSON" in call("report", tmp_path).sentence


def test_tables_of_an_experiment_come_with_its_runs(trained, call, tmp_path) -> None:
    experiment = tmp_path / "mine"
    experiment.mkdir()
    table = {"title": "Two ways", "columns": ["method"], "rows": [["lora"]], "notes": []}
    told = {"experiment": "mine", "backbone": "tiny", "scale": "smoke", "remarks": []}
    (experiment / "report.json").write_text(json.dumps({**told, "tables": [table]}))
    out = tmp_path / "page"
    assert call("report", trained.parent, "--out", out).code == 0
    assert "mine (tiny, scale smoke): Two ways" in (out / PAGE).read_text()
    (experiment / "report.json").write_text("?")
    assert "is not a report of `loralloc reproduce`" in call("report", trained.parent).sentence
