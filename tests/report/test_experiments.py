import json
import re

import pytest
from run_folders import EVIL, make_run

from loralloc.report.experiments import experiment_tables
from loralloc.report.folders import read_runs
from loralloc.report.page import page, report_on, write

TABLE = {
    "title": "boolq, accuracy by budget",
    "columns": ["method", "r=1", "r=2"],
    "rows": [["lora", "61.00", "62.50 ~"], ["alora", "63.00", "failed"]],
    "notes": ["~: inside the noise."],
}


@pytest.fixture
def folder(tmp_path):
    """The output folder of two experiments, and one of their runs."""
    make_run(tmp_path / "cells" / "tiny-llama" / "boolq" / "lora", method="lora")
    put(tmp_path, "figure2", tables=[TABLE, {**TABLE, "notes": []}], remarks=["Missing: one."])
    put(tmp_path, "table6", tables=[TABLE])
    return tmp_path


def put(folder, name, *, tables, remarks=()):
    data = {"experiment": name, "backbone": "tiny-llama", "scale": "smoke"}
    data |= {"tables": tables, "remarks": list(remarks)}
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "report.json").write_text(json.dumps(data))


def test_tables_of_experiments_come_with_what_is_said_below_them(folder):
    first, second, third = experiment_tables([folder, folder])
    assert first.title == "figure2 (tiny-llama, scale smoke): boolq, accuracy by budget"
    assert first.rows == TABLE["rows"] and first.notes == TABLE["notes"]
    assert second.notes == ["Missing: one."]
    assert third.title.startswith("table6")
    assert len({table.name for table in (first, second, third)}) == 3


def test_they_stand_first_on_the_page(folder):
    report = report_on(read_runs([folder]), experiments=experiment_tables([folder]))
    html = page(report)
    assert re.findall(r'<section id="(\w+)"', html)[:2] == ["experiments", "results"]
    assert '<td class="number">62.50 ~</td>' in html
    assert '<p class="note">Missing: one.</p>' in html
    out = folder / "out"
    write(report, out, formats=["markdown", "latex"])
    assert (out / "experiment-2.md").read_text().endswith("|\n\nMissing: one.\n")
    assert "% ~: inside the noise." in (out / "experiment-1.tex").read_text()


def test_a_page_on_other_runs_has_no_such_section(tmp_path):
    make_run(tmp_path / "run", method="lora")
    assert experiment_tables([tmp_path]) == []
    report = report_on(read_runs([tmp_path]), experiments=[])
    assert 'id="experiments"' not in page(report)


def test_what_a_report_says_is_text_and_nothing_else(folder):
    table = {"title": EVIL, "columns": [EVIL], "rows": [[EVIL]], "notes": [EVIL + "\nx"]}
    put(folder, "table6", tables=[table], remarks=[EVIL])
    tables = experiment_tables([folder])
    html = page(report_on(read_runs([folder]), experiments=tables))
    assert "<img" not in html and html.count("</script>") == 2
    assert all("\n" not in note for note in tables[-1].notes)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([{**TABLE, "rows": [["lora"]]}], "not as many cells"),
        ([{"title": "a"}], "lacks 'columns'"),
        (["a"], "string indices"),
        (7, "not iterable"),
    ],
)
def test_what_is_no_report_is_told_in_a_sentence(folder, tables, words):
    put(folder, "table6", tables=tables)
    with pytest.raises(ValueError, match=r"report\.json is not a report of `loralloc reproduce`"):
        experiment_tables([folder])
    with pytest.raises(ValueError, match=words):
        experiment_tables([folder])
