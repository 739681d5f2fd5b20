"""Gradients and late ranks on 4-bit weights."""

import kbit
import pytest
import tiny
import torch

from loralloc.allocation.objective import Objective
from loralloc.kernels.quantised import PACKS, keep_unpacked, train_in_float32

BATCH = tiny.causal_batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kbit.save_wide(tmp_path_factory.mktemp("wide-llama"))


@pytest.fixture(params=["4bit", "double"])
def model(folder, request):
    return tiny.with_trained_b(tiny.adapted(kbit.llama(folder, request.param)))


def gradients(model):
    model.train()
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def seen_in_evaluation(model):
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


def is_packed(model):
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("keep", [keep_unpacked, lambda model: Objective(model, [BATCH])])
def test_gradients_are_the_same_after_an_evaluation(keep, model):
    before = gradients(model)
    keep(model)
    seen_in_evaluation(model)
    assert not is_packed(model)
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)


def test_packed_weights_are_refused(model):
    layers = [layer for layer in model.modules() if hasattr(layer, PACKS)]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs nothing on this processor")
    seen_in_evaluation(model)
    assert is_packed(model)
    with pytest.raises(ValueError, match=r"pack the 4-bit weight of .*q_proj.* load the model aga"):
        keep_unpacked(model)


def test_half_precision_becomes_float32_where_it_trains(model):
    loras = [p for n, p in model.named_parameters() if "lora_" in n]
    for weight in loras:
        weight.data = weight.data.to(torch.bfloat16)
    loras[0].requires_grad_(False)
    optimizer = torch.optim.SGD(loras[1:], lr=0.1, momentum=0.9)
    optimizer.state[loras[1]] = {"momentum_buffer": torch.zeros_like(loras[1])}
    assert train_in_float32(model, optimizer) == len(loras) - 2
    assert [w.dtype for w in loras[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert train_in_float32(model, None) == 1  # what does not train stays
