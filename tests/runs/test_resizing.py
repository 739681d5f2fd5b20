"""Finished adapters with other ranks: what goes, what comes, and that it trains."""

import numpy as np
import pytest
import tiny
import torch
from adapter_folders import UNEVEN, logits, made
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from loralloc.adapters.folder import read_adapter
from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.runs.folder import save_labels
from loralloc.runs.resizing import Target, _check_labels, resize_folder
from loralloc.runs.verifying import _labels


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return made(tmp_path_factory.mktemp("llama"), tiny.llama(), r=20, ranks=UNEVEN)


@pytest.fixture
def rows(write_rows, tmp_path):
    """A folder of prompts and completions, more of them held out than importance is measured on."""
    lines = [{"prompt": f"the film {i} is", "completion": " good and warm"} for i in range(48)]
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", lines)
    return ["--dataset_name", str(tmp_path / "data")]


@pytest.fixture
def trained(llama_folder, tmp_path):
    """An adapter on a model that has a tokenizer."""
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "base")
    return made(tmp_path, AutoModelForCausalLM.from_pretrained(llama_folder), r=6)


def rank_by_energy(delta, energy: float) -> int:
    """The fewest ranks with that share of the squared singular values, one by one."""
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    for rank in range(1, len(values) + 1):
        if values[:rank].sum() >= energy * values.sum():
            return rank
    raise AssertionError


def test_each_module_keeps_the_share_of_its_energy(adapter, tmp_path):
    done = resize_folder(adapter, Target(energy=0.9), output=tmp_path / "new")
    old, new = read_adapter(adapter).modules, read_adapter(tmp_path / "new").modules
    for name, module in old.items():
        assert new[name].rank == rank_by_energy(module.delta(), 0.9) == done.after[name]
        assert new[name].scaling == pytest.approx(module.scaling)
        lost = (new[name].delta() - module.delta()).norm() ** 2 / module.delta().norm() ** 2
        assert lost <= 0.1 + 1e-5


def test_all_of_the_energy_changes_nothing(adapter, tmp_path):
    resize_folder(adapter, Target(energy=1.0), output=tmp_path / "new")
    torch.testing.assert_close(
        logits(tmp_path / "new", tiny.llama()), logits(adapter, tiny.llama()), atol=1e-5, rtol=1e-4
    )


def test_a_rank_for_all_is_the_best_of_that_rank_or_filled_up(adapter, tmp_path):
    done = resize_folder(adapter, Target(rank=5), output=tmp_path / "new")
    assert set(done.after.values()) == {5}
    config = read_adapter(tmp_path / "new").config
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (5, {}, {})
    old, new = read_adapter(adapter).modules, read_adapter(tmp_path / "new").modules
    for name, module in old.items():
        u, s, vt = np.linalg.svd(module.delta().numpy(), full_matrices=False)
        s[5:] = 0
        best = torch.from_numpy((u * s) @ vt)
        torch.testing.assert_close(new[name].delta(), best, atol=1e-5, rtol=1e-4)


def test_parameters_go_where_singular_values_are_largest(adapter, tmp_path):
    old = read_adapter(adapter).modules
    costs = {n: sum(m.a.shape[1:] + m.b.shape[:1]) for n, m in old.items()}
    total = sum(costs[name] * module.rank for name, module in old.items())
    done = resize_folder(adapter, Target(params=total // 3), output=tmp_path / "new")
    assert sum(costs[n] * rank for n, rank in done.after.items()) <= total // 3
    values = {n: np.linalg.svd(m.delta().numpy(), compute_uv=False) for n, m in old.items()}
    kept = [x for n, rank in done.after.items() for x in values[n][:rank]]
    gone = [x for n, rank in done.after.items() for x in values[n][rank : old[n].rank]]
    assert min(kept) >= max(gone) * (1 - 1e-5)


def test_new_ranks_change_nothing_and_train(adapter, tmp_path):
    resize_folder(adapter, Target(rank=24), output=tmp_path / "new")
    torch.testing.assert_close(
        logits(tmp_path / "new", tiny.llama()), logits(adapter, tiny.llama()), atol=1e-5, rtol=1e-5
    )
    old = read_adapter(adapter).ranks
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "new", is_trainable=True)
    tiny.train(
        model, tiny.batch_for(model), num_steps=50, optimizer=tiny.optimizer_for(model, 5e-3)
    )
    seen = 0
    for name, (a, b) in weights_ab(lora_layers(model)).items():
        values = torch.linalg.svdvals(b.detach() @ a.detach())
        if old[name] < len(values):  # keys are 16 wide, and one has 20 ranks from the start
            assert values[old[name]] > 1e-3 * values[0], name
            seen += 1
    assert seen >= 11


def test_scores_decide_where_they_are_asked_for_and_the_loss_is_told(trained, rows, tmp_path):
    before = read_adapter(trained).modules
    total = sum(m.rank * (m.a.shape[1] + m.b.shape[0]) for m in before.values())
    by_scores, by_values = (
        resize_folder(
            trained, Target(params=int(total * 0.7)), data=rows, by=by, output=tmp_path / by
        )
        for by in ("scores", "singular-values")
    )
    # What is drawn harms as often as it helps, which importance tells and singular values do not.
    assert by_scores.losses[0] == by_values.losses[0] > by_scores.losses[1]
    assert by_scores.losses[1] < by_values.losses[1] - 0.01
    assert by_scores.after != by_values.after


def test_data_of_another_kind_is_refused(trained, write_rows, tmp_path):
    lines = [{"text": f"the film {i}", "label": i % 2} for i in range(48)]
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", lines)
    data = ["--dataset_name", str(tmp_path / "data"), "--head", "classification"]
    with pytest.raises(ValueError, match=r"a classification head, and the adapter in .* is for lm"):
        resize_folder(trained, Target(rank=2), data=data)


@pytest.mark.parametrize("found", [["neg", "pos"], ["neg", "neutral", "pos", "mixed"]])
def test_data_whose_labels_have_other_numbers_is_refused(found, tmp_path):
    _check_labels(found, tmp_path)  # which says nothing of labels
    save_labels(tmp_path, ("neg", "neutral", "pos"))
    with pytest.raises(ValueError, match=r"has the labels neg, .*, and the run in .* knows neg, "):
        _check_labels(found, tmp_path)
    _check_labels(["neg", "neutral", "pos"], tmp_path)


def test_a_classifier_has_as_many_labels_as_its_last_layer_has_rows(tmp_path):
    config = DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2, vocab_size=20)
    model = DistilBertForSequenceClassification(config)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"])
    get_peft_model(model, lora).save_pretrained(tmp_path)
    assert _labels(tmp_path) == ["LABEL_0", "LABEL_1"]  # beside `pre_classifier` of 16 rows


def test_more_parameters_are_shared_evenly(adapter, tmp_path):
    old = read_adapter(adapter).modules
    costs = {n: sum(m.a.shape[1:] + m.b.shape[:1]) for n, m in old.items()}
    total = sum(costs[name] * module.rank for name, module in old.items())
    target = Target(params=total + 2 * sum(costs.values()) + 1)
    done = resize_folder(adapter, target, output=tmp_path / "new")
    assert all(done.after[name] == rank + 2 for name, rank in done.before.items())


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (dict(rank=3), dict(by="scores"), "held-out data, and none is given"),
        (dict(rank=3), dict(by="norms"), "`--by` is 'norms'; use one of singular-values, scores"),
        (dict(energy=0.5), dict(by="scores", data=["--task", "sst2"]), "reads none; use `--rank`"),
        (dict(params=10_000), {}, "which changes nothing"),
        (dict(params=1), {}, "No rank would be left"),
    ],
)
def test_what_cannot_take_effect_is_refused(target, options, message, adapter, tmp_path):
    if target == dict(params=10_000):
        old = read_adapter(adapter).modules
        target = dict(params=sum(m.rank * (m.a.shape[1] + m.b.shape[0]) for m in old.values()))
    with pytest.raises(ValueError, match=message):
        resize_folder(adapter, Target(**target), output=tmp_path / "new", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "0 are given; give one"),
        (dict(rank=3, energy=0.5), "2 are given; give one"),
        (dict(rank=0), "`--rank` is 0; it must be at least 1"),
        (dict(energy=1.5), "above 0 and at most 1"),
    ],
)
def test_one_size_in_range_is_asked_for(options, message):
    with pytest.raises(ValueError, match=message):
        Target(**options)
