"""Losses that differ in their last digits are computed in float32, or known to be rounded."""

import pytest
import rounding
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import ablation
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective, full_precision
from loralloc.allocation.policy import Limits

BATCH = tiny.causal_batch()


def trained(model=None):
    return tiny.with_trained_b(tiny.adapted(model or tiny.llama(), r=2))


def prepared(model):
    """The model as Accelerate prepares it for a run in mixed precision."""
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert "_original_forward" in vars(model)
    return model


@torch.no_grad()
def loss_of(model):
    return float(model(**BATCH).loss)


class QuantisedLinear(nn.Linear):
    """As bitsandbytes has it: codes for weights, products in bfloat16, float32 put out."""

    def forward(self, x):
        product = nn.functional.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        return product.to(x.dtype)


def quantised():
    model = trained()
    for layer in lora_layers(model).values():
        layer.base_layer.__class__ = QuantisedLinear
    return model


def mixed_weights():
    """Norms and head in float32, as for training on quantised weights; it needs mixed precision."""
    model = tiny.llama().to(torch.bfloat16)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.float()
    model.lm_head.float()
    return trained(model)


@pytest.fixture(autouse=True)
def accelerate_knows_of_no_other_run():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_exact_scores_under_mixed_precision_are_those_of_float32():
    plain, mixed = trained(), prepared(trained())
    loss = loss_of(mixed)  # what the run computes is rounded
    expected, scores = (
        ablation.score(Objective(m, [BATCH]), weights_b(lora_layers(m)), Limits(num_pruned=1))
        for m in (plain, mixed)
    )
    assert abs(loss + expected.s_full) > 1e-4
    assert scores.s_full == expected.s_full and scores.s_base == expected.s_base
    for term, by_module in expected.terms.items():
        for name, values in by_module.items():
            assert torch.equal(scores.terms[term][name], values)
    assert loss_of(mixed) == loss  # and is as it was


def test_forward_is_put_back_also_when_scoring_fails():
    model = prepared(trained())
    forward, own = model.forward, model._original_forward
    with pytest.raises(ZeroDivisionError), Objective(model, [BATCH]).evaluating():
        assert model.forward == own
        raise ZeroDivisionError
    assert model.forward is forward


def test_what_is_rounded_is_told_by_what_is_computed():
    assert Objective(trained(), [BATCH]).rounding is None
    assert Objective(prepared(trained()), [BATCH]).rounding is None
    for dtype in (torch.bfloat16, torch.float16):
        assert Objective(trained(tiny.llama().to(dtype)), [BATCH]).rounding == dtype
    assert all(p.dtype == torch.float32 for p in quantised().parameters())
    assert Objective(quantised(), [BATCH]).rounding == torch.bfloat16


def test_a_model_that_needs_mixed_precision_has_it_before_and_in_the_run():
    before = Objective(mixed_weights(), [BATCH], mixed=torch.bfloat16)
    within = Objective(prepared(mixed_weights()), [BATCH], mixed=torch.bfloat16)
    assert before.rounding == within.rounding == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        Objective(mixed_weights(), [BATCH]).mean_loss()


@pytest.mark.parametrize(
    "build", [quantised, lambda: trained(tiny.llama().to(torch.bfloat16))], ids=["4bit", "bf16"]
)
def test_ablation_is_refused_at_the_start_where_losses_are_rounded(build):
    words = "`score` is 'ablation'.* computes in bfloat16.* use 'gradient' or 'screened'"
    with pytest.raises(ValueError, match=words):
        Allocator(build(), AllocationConfig(score="ablation"), [BATCH])


def test_products_are_exact_where_the_user_lets_them_be_rounded():
    model = trained()
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with full_precision(model):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_bound_on_rounding_holds_for_a_model_in_float64():
    model = tiny.llama()
    loss = loss_of(model)
    exact = loss_of(model.double())
    assert abs(loss - exact) < rounding.of_losses(model, exact)
