"""A plain installation: what needs an extra says which."""

import sys
from pathlib import Path

import pytest

from loralloc.cli import EXTRAS, main

if sys.version_info >= (3, 11):
    import tomllib


@pytest.fixture
def without(monkeypatch):
    """Let a package be not installed."""

    def without(name):
        class Missing:
            def find_spec(self, wanted, path=None, target=None):
                if wanted.partition(".")[0] == name:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])

    return without


def test_a_picture_without_matplotlib_names_the_extra(train, output, call, without, tmp_path):
    assert train().code == 0
    without("matplotlib")
    assert call("ranks", output).code == 0
    sentence = call("ranks", output, "--png", tmp_path / "ranks.png").sentence
    assert sentence.endswith('install it with `pip install "loralloc[report]"`.')


def test_an_experiment_that_could_not_be_drawn_does_not_begin(call, without, tmp_path):
    without("matplotlib")
    words = ("reproduce", "table1", "--scale", "smoke", "--output_dir", tmp_path / "runs")
    assert '"loralloc[report]"' in call(*words).sentence
    assert not (tmp_path / "runs").exists()


def test_what_measures_a_text_is_missed_before_it_is_written(train, output, call, without):
    assert train().code == 0
    without("rouge_score")
    sentence = call("eval", output, "--task", "e2e", "--data", output).sentence
    assert sentence.endswith('install it with `pip install "loralloc[metrics]"`.')


def test_another_package_that_is_missing_names_no_extra(monkeypatch, capsys):
    import loralloc.cli.tasks as verb

    def run(args):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(verb, "run", run)
    assert main(["tasks"]) == 2
    assert capsys.readouterr().err == "loralloc: error: No module named 'other'\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_extras_are_those_of_the_package():
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    for module, extra in EXTRAS.items():
        package = module.replace("_", "-")
        found = project["optional-dependencies"][extra]
        assert any(line.startswith(f"{package}>") for line in found)
        assert not any(line.startswith(f"{package}>") for line in project["dependencies"])
