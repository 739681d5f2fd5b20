"""Coming back to an adapter as it was, with its optimiser."""

import copy

import pytest
import tiny
import torch
from trainers import adapter, ranks_now

from loralloc import resize
from loralloc.allocation.layers import lora_config, lora_layers, weight_b
from loralloc.allocation.snapshot import Snapshot
from loralloc.kernels.lora import fuse

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SMALLER = {Q: 1, V: 0}


def trained():
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model)
    tiny.train(model, tiny.causal_batch(), 3, optimizer)
    return model, optimizer


def kept(optimizer) -> list:
    return copy.deepcopy(
        [optimizer.state_dict()["state"], len(optimizer.param_groups[0]["params"])]
    )


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_all_is_as_it_was_and_trains_as_it_would_have():
    model, optimizer = trained()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    before, state, config = adapter(model), kept(optimizer), copy.deepcopy(lora_config(model))
    snapshot = Snapshot.take(model, optimizer)
    resize(model, SMALLER, optimizer=optimizer)
    tiny.train(model, tiny.causal_batch(), 3, optimizer)
    assert V not in ranks_now(model) and not same(kept(optimizer), state)

    snapshot.restore(model, optimizer)
    assert same(adapter(model), before) and same(kept(optimizer), state)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    now = lora_config(model)
    for option in ("rank_pattern", "alpha_pattern", "exclude_modules"):
        assert getattr(now, option) == getattr(config, option)
    assert set(map(id, optimizer.state)) == set(map(id, optimizer.param_groups[0]["params"]))

    other, its_optimizer = trained()
    for each, of_it in ((model, optimizer), (other, its_optimizer)):
        tiny.train(each, tiny.causal_batch(seed=4), 2, of_it)
    assert same(adapter(model), adapter(other))


def test_training_on_changes_nothing_that_was_taken():
    model, optimizer = trained()
    snapshot = Snapshot.take(model, optimizer)
    before = adapter(model)
    for _ in range(2):
        tiny.train(model, tiny.causal_batch(), 2, optimizer)
        snapshot.restore(model, optimizer)
        assert same(adapter(model), before)


def test_a_fused_layer_comes_back_into_its_place():
    model, optimizer = trained()
    fuse(model)
    snapshot, batch = Snapshot.take(model, optimizer), tiny.causal_batch()
    with torch.no_grad():
        expected = model(**batch).logits
    resize(model, SMALLER, optimizer=optimizer)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, expected)
    snapshot.restore(model, optimizer)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    layer = lora_layers(model)[V]
    tiny.train(model, batch, 1, optimizer)
    assert layer.training == model.training and weight_b(layer).requires_grad


def test_what_else_trains_comes_back_too():
    model = tiny.adapted(tiny.bert_classifier(), modules_to_save=["classifier"])
    optimizer = tiny.optimizer_for(model)
    snapshot = Snapshot.take(model, optimizer)
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    before = [p.detach().clone() for p in head]
    tiny.train(model, tiny.classification_batch(), 2, optimizer)
    assert not all(map(torch.equal, head, before))
    snapshot.restore(model, optimizer)
    assert head and all(map(torch.equal, head, before))


def test_groups_with_rates_of_their_own_keep_their_parameters_in_order():
    model = tiny.adapted(tiny.llama())
    parts = {
        part: [p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B")
    }
    groups = [{"params": parts["lora_A"], "lr": 1e-3}, {"params": parts["lora_B"], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    snapshot = Snapshot.take(model, optimizer)
    resize(model, SMALLER, optimizer=optimizer)
    snapshot.restore(model, optimizer)
    assert [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups] == shapes
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trains


def test_it_goes_over_to_a_model_that_was_built_anew():
    model, optimizer = trained()
    before = adapter(model)
    state = copy.deepcopy(Snapshot.take(model, optimizer).state())
    other = tiny.adapted(tiny.llama())
    structure = Snapshot.of_structure(other)
    its_optimizer = tiny.optimizer_for(other)
    resize(other, SMALLER, optimizer=its_optimizer)
    structure.load_state(state)
    structure.restore(other, its_optimizer)
    assert same(adapter(other), before) and same(kept(its_optimizer), kept(optimizer))


def test_an_optimiser_of_something_else_is_refused():
    model = tiny.adapted(tiny.llama())
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="trains a parameter that is no part of the model"):
        Snapshot.take(model, optimizer)
