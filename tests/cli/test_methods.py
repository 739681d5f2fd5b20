"""`loralloc methods`: what a person reads before choosing one."""

import json

import pytest

from loralloc.cli import main
from loralloc.methods.catalog import METHODS


@pytest.fixture(scope="module")
def listed(llama_folder):
    """Rows by name of `--json` for the tiny Llama."""

    def rows(capsys, *flags):
        assert main(["methods", "--json", "--model", str(llama_folder), *flags]) == 0
        data = json.loads(capsys.readouterr().out)
        return data["budget"], {row["name"]: row for row in data["rows"]}

    return rows


def test_every_method_is_listed_with_where_it_comes_from(listed, capsys):
    _, rows = listed(capsys)
    assert list(rows) == list(METHODS)
    for row in rows.values():
        assert row["paper"]
        assert row["status"] in ("faithful", "port", "reconstruction", "control", "ours")
        assert row["status"] == "faithful" or row["differs"], row["name"]
        assert row["learning_rate"] > 0 and row["rate_from"], row["name"]
        assert {row["initialisation"], row["settings"]} <= {"published", "ours"}, row["name"]


def test_parameters_are_those_nearest_to_the_budget(listed, capsys):
    budget, rows = listed(capsys, "--budget", "20000")
    assert budget == 20_000
    lora = rows["lora"]
    per_rank = lora["parameters"] // lora["size"]
    assert abs(lora["parameters"] - budget) <= per_rank / 2
    assert abs(rows["houlsby"]["parameters"] - budget) <= 2 * 2 * 2 * 32
    assert rows["full"]["parameters"] > budget


def test_how_far_parameters_are_from_the_budget_is_said(listed, capsys):
    _, rows = listed(capsys, "--budget", "20000")
    lora = rows["lora"]
    assert lora["over_budget"] == pytest.approx(lora["parameters"] / 20_000 - 1)
    assert rows["bitfit"]["over_budget"] is None


def test_a_method_whose_smallest_size_is_beyond_the_budget_says_so(listed, capsys):
    _, rows = listed(capsys, "--budget", "100")
    assert rows["lora"]["parameters"] is None
    assert "budget is 100" in rows["lora"]["too_large"]


def test_without_a_model_it_is_the_papers(capsys):
    assert main(["methods", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in data["rows"]}
    assert data["budget"] == rows["lora"]["paper_parameters"] == 19_988_480
    assert rows["houlsby"]["paper_parameters"] == 20_971_520


def test_the_table_shows_names_and_numbers(capsys, monkeypatch, llama_folder):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["methods", "--model", str(llama_folder), "--budget", "20000"]) == 0
    out = capsys.readouterr().out
    assert "a budget of 20,000 parameters" in " ".join(out.split())  # a long folder wraps
    for name in METHODS:
        assert name in out
