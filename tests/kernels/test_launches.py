"""A training step tells a GPU to do less than PEFT's, and ranks of many sizes no more."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from launches import Launches
from lora_steps import fused_copy

from loralloc.kernels import lora, products

MIXED = {"q_proj": 3, "v_proj": 7, "o_proj": 6, "up_proj": 5, "down_proj": 11}


@pytest.fixture(autouse=True)
def ways_of_a_gpu(monkeypatch):
    """Products as they are made where no processor's peculiarities count."""
    monkeypatch.setattr(lora, "FEW_ROWS", ())
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)


def block(kind, **ranks):
    """A decoder with one block; the weights of "float32 adapter" are as PEFT has them."""
    model = tiny.adapted(tiny.llama(num_hidden_layers=1), r=8, **ranks)
    halves = {"bfloat16": "", "bfloat16, float32 adapter": "lora_"}
    for name, parameter in model.named_parameters():
        if kind in halves and not (halves[kind] and halves[kind] in name):
            parameter.data = parameter.data.bfloat16()
    return tiny.with_trained_b(model).train()


def launches_of_a_step(model, kind):
    """Of the second step's block alone, forward and backward."""
    inner = model.get_base_model().model
    x = torch.randn(2, 12, 32).to(inner.norm.weight.dtype).requires_grad_()
    rotary = inner.rotary_emb(x, torch.arange(12)[None])
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        is_cast = kind == "autocast"
        with Launches() as launches:
            with torch.autocast("cpu", torch.bfloat16) if is_cast else nullcontext():
                output = inner.layers[0](x, position_embeddings=rotary)
            output.backward(torch.ones_like(output))
    return launches.count


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("float32", 0.8),
        ("autocast", 0.75),
        ("bfloat16", 0.8),
        ("bfloat16, float32 adapter", 0.75),
    ],
)
def test_of_one_block(kind, most):
    model = block(kind)
    peft = launches_of_a_step(model, kind)
    ours = launches_of_a_step(fused_copy(model), kind)
    assert ours <= most * peft
    mixed = launches_of_a_step(fused_copy(block(kind, rank_pattern=MIXED)), kind)
    assert mixed <= 1.03 * ours
