"""Training steps of a fused model in the half precisions that users train in."""

import copy
from contextlib import nullcontext

import pytest
import tiny
import torch
from lora_steps import fused_copy

HALVES = {
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, float32 adapter": (torch.bfloat16, None),
    "float16": (torch.float32, torch.float16),
}


def adapted(kind):
    dtype, _ = HALVES[kind]
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    for name, parameter in model.named_parameters():
        if "lora_" not in name or "adapter" not in kind:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def trained(model, kind, *, scale=2.0**10, num_steps=6, fused=True):
    """Losses of some steps on one batch, and the scaler."""
    _, cast = HALVES[kind]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", enabled=cast is torch.float16, init_scale=scale)
    losses = []
    for _ in range(num_steps):
        with torch.autocast("cpu", cast) if cast else nullcontext():
            loss = model(**tiny.causal_batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, scaler


@pytest.mark.parametrize("kind", HALVES)
def test_losses_of_some_steps_are_those_of_peft_to_rounding(kind):
    model = adapted(kind)
    fused = fused_copy(model)
    expected, _ = trained(model, kind)
    found, _ = trained(fused, kind)
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < 0.9 * found[0]


def test_a_step_that_overflows_is_skipped_and_the_next_ones_learn():
    fused = fused_copy(adapted("float16"))
    before = copy.deepcopy({n: p for n, p in fused.named_parameters() if "lora_" in n})
    _, scaler = trained(fused, "float16", scale=2.0**40, num_steps=1)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(fused.get_parameter(n), p) for n, p in before.items())
    losses, _ = trained(fused, "float16")
    assert losses[-1] < 0.9 * losses[0]
