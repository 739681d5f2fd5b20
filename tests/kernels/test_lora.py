"""The fused LoRA step equals PEFT's own forward and gradients."""

import copy

import pytest
import torch
from peft.tuners.lora import Linear

from loralloc.kernels.lora import fuse, is_fused
from tests import tiny

CAUSAL = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def fused_copy(model):
    fused = copy.deepcopy(model)
    assert fuse(fused) > 0
    return fused


def loss_and_gradients(model):
    with tiny.seeded(2):
        loss = model(**tiny.causal_batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(model, other, *, tolerance):
    loss, gradients = loss_and_gradients(model)
    other_loss, other_gradients = loss_and_gradients(other)
    assert gradients.keys() == other_gradients.keys() and gradients
    torch.testing.assert_close(other_loss, loss, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        difference = (other_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < tolerance, name
        assert other_gradients[name].dtype == gradient.dtype


@pytest.mark.parametrize("build", CAUSAL.values(), ids=CAUSAL)
def test_loss_and_gradients_equal_those_of_peft(build):
    model = tiny.with_trained_b(tiny.adapted(build()))
    assert_equal_steps(model, fused_copy(model), tolerance=1e-5)


@pytest.mark.parametrize("build", CAUSAL.values(), ids=CAUSAL)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_peft(build):
    model = tiny.with_trained_b(tiny.adapted(build().to(torch.bfloat16)))
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    truth, peft, fused = (
        torch.cat([g.flatten().float() for g in loss_and_gradients(m)[1].values()])
        for m in (copy.deepcopy(model).float(), model, fused_copy(model))
    )
    assert (fused - truth).norm() < 1.5 * (peft - truth).norm() < 0.2 * truth.norm()


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    fused = tiny.checkpointing(fused_copy(model)).train()
    assert_equal_steps(model.train(), fused, tolerance=1e-5)


def test_dropout_runs_the_forward_of_peft():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), lora_dropout=0.5)).train()
    assert_equal_steps(model, fused_copy(model), tolerance=1e-6)


def test_autocast_runs_the_forward_of_peft():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    fused = fused_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (m(**tiny.causal_batch()).loss for m in (model, fused))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_switched_off_and_merged_adapters_run_the_forward_of_peft():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    fused = fused_copy(model)
    batch = tiny.causal_batch()
    with fused.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(fused(**batch).logits, tiny.llama()(**batch).logits)
    with torch.no_grad():
        torch.testing.assert_close(
            fused.merge_and_unload()(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_trainable_base_weights_keep_their_gradient():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.base_layer.weight"):
            parameter.requires_grad_(True)
    assert_equal_steps(model, fused_copy(model), tolerance=1e-5)


def test_only_plain_layers_are_changed_and_they_stay_layers_of_peft():
    model = tiny.adapted(tiny.llama())
    count = sum(type(module) is Linear for module in model.modules())
    assert fuse(model) == count and fuse(model) == 0
    assert all(isinstance(m, Linear) for m in model.modules() if is_fused(m))
