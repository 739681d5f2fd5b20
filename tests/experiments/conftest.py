"""One grid of the smallest runs, made once."""

from dataclasses import replace

import pytest

from loralloc.experiments.experiment import load_experiment, load_scale
from loralloc.experiments.grid import make_grid

QUICK = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 2}
"""Options of a run that is over at once."""


@pytest.fixture(scope="session")
def quick():
    """The smoke scale, with fewer steps and rows."""
    scale = load_scale("smoke")
    settings = {**scale.settings, **QUICK}
    rows = {"train": 8, "validation": 4, "test": 4}
    return replace(scale, settings=settings, rows=rows)


@pytest.fixture(scope="session")
def make(tmp_path_factory, quick):
    """A grid of an experiment with some of its fields changed, in a folder of its own."""

    def make(name="table1", *, root=None, seeds=None, scale=quick, data=None, **changes):
        experiment = replace(load_experiment(name), **changes)
        root = root or tmp_path_factory.mktemp("reproduce")
        return make_grid(experiment, scale, root=root, seeds=seeds, data=data)

    return make


@pytest.fixture(scope="session")
def lora_cells(make):
    """Two cells of LoRA on SST-2 that differ in their seed."""
    grid = make(methods=("lora",), tasks=("sst2",), seeds=(0, 1))
    return grid.at_one_rate("paper", {})
