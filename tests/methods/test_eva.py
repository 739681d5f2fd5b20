"""EVA as PEFT has it, with our resizing under an optimiser."""

from collections import defaultdict

import numpy as np
import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from reference import competitors as slow
from session import BUILDS, Drive, prepared

from loralloc.allocation.layers import lora_layers, ranks, weights_ab
from loralloc.methods.eva import Eva


def made(shape="llama", **options):
    return prepared(Eva(rank=3, **{"tau": 0.9, **options}), BUILDS[shape]())


def test_ranks_and_first_rows_are_those_that_peft_gives():
    method = made()
    drive = Drive(method).begin()
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=tiny.LLAMA_TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(tau=0.9),
    )
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        model = get_peft_model(tiny.llama(), config)
    batches = [dict(batch) for batch in drive.session.training(64)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    expected = lora_layers(model)
    found = lora_layers(method.model)
    assert ranks(found) == ranks(expected)
    assert len(set(ranks(found).values())) > 1
    for name, (a, b) in weights_ab(found).items():
        torch.testing.assert_close(a, expected[name].lora_A["default"].weight)
        assert not b.any()
        assert found[name].scaling == expected[name].scaling


@pytest.mark.parametrize("shape", BUILDS)
def test_the_ranks_are_the_largest_shares_of_variance_and_train(shape):
    method = made(shape)
    drive, now, inputs = Drive(method), {}, defaultdict(list)
    handles = [
        layer.register_forward_hook(
            lambda module, args, output, name=name: now.update({name: args[0]})
        )
        for name, layer in lora_layers(method.model).items()
    ]
    for batch in drive.session.training(64):
        mask = batch["attention_mask"].bool()
        if batch["labels"].ndim > 1:
            mask &= batch["labels"] != tiny.IGNORED
        with torch.no_grad():
            method.model(**batch)
        for name, x in now.items():
            inputs[name].append(x[mask])
    for handle in handles:
        handle.remove()
    expected = slow.eva_ranks([torch.cat(x).numpy() for x in inputs.values()], rank=3, rho=2.0)
    drive.begin()
    after = ranks(lora_layers(method.model))
    found = [after.get(name, 0) for name in inputs]
    assert sum(found) == sum(expected)
    # PEFT's decomposition is incremental and of low rank, so that it is near, not equal.
    assert np.abs(np.array(found) - expected).sum() <= 0.15 * sum(expected)
    known = {id(p) for group in drive.optimizer.param_groups for p in group["params"]}
    assert all({id(a), id(b)} <= known for a, b in weights_ab(lora_layers(method.model)).values())


def test_with_rho_of_1_every_layer_has_as_many():
    method = made(rho=1.0)
    Drive(method).begin()
    assert set(ranks(lora_layers(method.model)).values()) == {3}


def test_batches_with_fewer_tokens_than_components_are_refused_and_nothing_is_printed(capsys):
    method = made(rho=30.0)
    with pytest.raises(ValueError, match=r"eva takes up to 90 components .* has as many tokens"):
        Drive(method).begin()
    assert not capsys.readouterr().out


def test_components_that_do_not_settle_are_refused(monkeypatch):
    monkeypatch.setattr("loralloc.methods.eva.MOST_PASSES", 1)
    with pytest.raises(ValueError, match="have not settled after 1 passes over 2 batches; lower"):
        Drive(made(tau=1.0)).begin()


def test_where_labels_leave_too_few_tokens_all_count():
    method, seen = made(rho=2.0), []
    drive = Drive(method)
    batches = [dict(batch) for batch in drive.session.training(64)]
    for batch in batches:
        batch["labels"][:, :-1] = tiny.IGNORED
    drive.session.training = lambda num_examples: batches
    own = method._components
    method._components = lambda given: (seen.extend(given), own(given))[1]
    drive.begin()
    assert seen and sum(ranks(lora_layers(method.model)).values()) == 3 * 14
