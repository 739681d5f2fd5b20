"""The executor for Ray: what it refuses, and two nodes of which one is lost."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_work import without_times

from loralloc.experiments.executors.executor import Resources, get_executor
from loralloc.experiments.work import attempt

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def test_without_ray_the_package_is_named(lora_cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'loralloc\[ray\]'"):
        list(get_executor("ray")(lora_cells, Resources()))


@needs_ray
@pytest.mark.slow
@pytest.mark.reliability
def test_two_nodes_of_which_one_is_lost_give_the_same_numbers(lora_cells, tmp_path):
    longer = [replace(c, options={**c.options, "max_steps": 30}) for c in lora_cells]
    cells = [replace(cell, root=str(tmp_path)) for cell in longer]
    given, answer = tmp_path / "cells.json", tmp_path / "outcomes.json"
    given.write_text(json.dumps([cell.as_data() for cell in cells]))
    script = Path(__file__).with_name("two_ray_nodes.py")
    words = [sys.executable, str(script), str(given), str(answer)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(answer.read_text())
    assert (found["finished"], found["lost"]) == (0, True)
    assert [outcome["failure"] for outcome in found["outcomes"]] == ["", ""]
    by_seed = {outcome["seed"]: outcome["result"] for outcome in found["outcomes"]}
    for cell in longer:
        assert without_times(by_seed[cell.seed]) == without_times(attempt(cell).result)
