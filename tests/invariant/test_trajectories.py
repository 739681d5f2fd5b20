"""Every run goes as it was recorded."""

import json
from pathlib import Path

import pytest

from invariant.runs import RUNS


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_as_recorded(name, tmp_path):
    expected = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    found = RUNS[name](tmp_path)
    assert found["ranks"] == expected["ranks"]
    # Other processors round otherwise.
    nearly = dict(rel=1e-4, abs=1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], **nearly)
    assert found["development_loss"] == pytest.approx(expected["development_loss"], **nearly)
