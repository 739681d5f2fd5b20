"""The method of docs/add-a-method.md, as it is printed there: the table of checks, and a run."""

import re
import sys
from pathlib import Path

import pytest
import test_every_method as table
import tiny
import torch
from peft import TaskType

from loralloc import get_method, open_adapter, prepare, train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"
NAME = "scales:Scales"

CHECKS = [
    table.test_at_step_0_it_equals_the_backbone_or_says_why_not,
    table.test_it_learns_and_leaves_the_backbone_as_it_was,
    table.test_saved_and_opened_it_computes_the_same,
    table.test_merged_it_computes_the_same_or_says_that_it_cannot_merge,
    table.test_the_same_seed_trains_the_same,
    table.test_it_has_the_parameters_that_it_was_sized_for,
]


@pytest.fixture
def shown(tmp_path, monkeypatch) -> str:
    """The page's code, as a module of the working directory."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "scales.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("scales", None)
    yield code
    sys.modules.pop("scales", None)


def test_it_takes_25_lines(shown):
    assert len([line for line in shown.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("shape", table.BUILDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_passes_the_table_of_checks(check, shape, shown, tmp_path, monkeypatch):
    monkeypatch.setitem(table.LEARNING_RATES, NAME, 0.3)
    names = check.__code__.co_varnames[: check.__code__.co_argcount]
    given = {"tmp_path": tmp_path / "saved", "name": NAME, "shape": shape}
    if "trained" in names:
        given["trained"] = table.trained_once(NAME, shape)
    check(**{name: given[name] for name in names})


def test_resumed_it_trains_as_if_it_had_not_stopped(shown, tmp_path):
    table.test_resumed_it_trains_as_if_it_had_not_stopped(NAME, "llama", 15, tmp_path / "saved")


def test_a_run_trains_with_it_and_its_folder_opens_with_its_class(
    shown, llama_folder, write_rows, tmp_path
):
    rows = [{"sentence": f"the film {i} is good", "label": i % 2} for i in range(32)]
    for split in ("train", "dev"):
        write_rows(tmp_path / "sst2" / f"{split}.jsonl", rows)
    run = prepare(
        {
            "task": "sst2",
            "dataset_name": str(tmp_path / "sst2"),
            "model_name_or_path": str(llama_folder),
            "method": NAME,
            "max_steps": 2,
            "learning_rate": 0.1,
            "output_dir": str(tmp_path / "run"),
        }
    )
    train(run)
    kind = get_method(NAME)
    assert isinstance(run.method, kind)
    opened = open_adapter(
        tiny.llama(vocab_size=run.model.config.vocab_size), tmp_path / "run", method=kind
    )
    scale = opened.model.layers[0].mlp.scale
    assert torch.equal(scale, run.model.model.layers[0].mlp.scale)
    assert not torch.equal(scale, torch.ones(32))
    assert run.method._task_type == TaskType.CAUSAL_LM
