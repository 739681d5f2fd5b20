"""The script behind the table of pruning orders in docs/alora.md."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from loralloc.allocation.comparison import example_losses
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "experiments"))
    yield importlib.import_module("pruning_order")
    sys.path.remove(str(ROOT / "experiments"))


def test_the_lowest_go_up_to_a_share_of_the_parameters(script):
    importance = {"a": torch.tensor([3.0, 0.0, 5.0]), "b": torch.tensor([1.0, 2.0])}
    costs = {"a": 10, "b": 35}
    assert script.lowest(importance, costs, 0.1) == {"a": (1,), "b": ()}
    assert script.lowest(importance, costs, 0.45) == {"a": (1,), "b": (0,)}
    assert script.lowest(importance, costs, 0.85) == {"a": (0, 1), "b": (0, 1)}


def test_squares_are_those_of_each_examples_slope_by_the_gate(script):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2)).eval()
    weights = weights_b(lora_layers(model))
    batch = tiny.causal_batch(3)
    objective = Objective(model, [batch])
    found = script.squares(objective, weights)
    name, b = next(iter(weights.items()))
    own = b.detach().clone()

    def losses(gates):
        b.data = own * gates
        sums = example_losses(objective).sums
        b.data = own
        return sums

    step = 1e-3
    for rank in range(2):
        gates = torch.ones(2)
        gates[rank] += step
        lower = torch.ones(2)
        lower[rank] -= step
        slopes = (losses(gates) - losses(lower)) / (2 * step)
        assert float(found[name][rank]) == pytest.approx(float((slopes**2).sum()), rel=0.05)


def test_the_table_in_the_docs_is_that_of_the_results(script):
    text = script.PAGE.read_text(encoding="utf-8")
    between = text.partition(script.BEGIN)[2].partition(script.END)[0]
    found = json.loads(script.RESULT.read_text(encoding="utf-8"))
    assert between.strip().split("\n") == script.table(found)
