"""docs/reliability.md says what experiments wrote, and names tests that there are."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "experiments"))
    import reliability_page

    yield reliability_page
    sys.path.remove(str(ROOT / "experiments"))


def test_the_page_is_what_the_results_say(script):
    assert script.PAGE.read_text() == script.page()


def test_the_tests_that_it_names_are_there(script):
    names = {name for of in script.TESTS.values() for name in of}
    assert not [name for name in names if not (ROOT / "tests" / name).exists()]


def test_a_fault_is_on_the_page(script, tmp_path, monkeypatch):
    text = script.FUZZ.read_text().replace('"faults": []', '"faults": ["crash-1"]', 1)
    monkeypatch.setattr(script, "FUZZ", tmp_path / "fuzz.json")
    script.FUZZ.write_text(text)
    assert sum(line.endswith("| 1 |") for line in script.page().splitlines()) == 1
