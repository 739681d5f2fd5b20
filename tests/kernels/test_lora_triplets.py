"""AdaLoRA's layers take the fused step too: what multiplies its triplets is put into Q."""

import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, fused_copy
from peft import AdaLoraConfig, get_peft_model

from loralloc.kernels.lora import unfuse


def adapted(build, *, dropout: float = 0.0):
    model = build()
    options = {} if build is not tiny.gpt2 else {"fan_in_fan_out": True}
    config = AdaLoraConfig(
        init_r=3,
        target_r=2,
        lora_alpha=5,
        lora_dropout=dropout,
        total_step=10,
        target_modules=tiny.BERT_TARGETS
        if build is tiny.bert_classifier
        else (["c_attn", "c_proj"] if build is tiny.gpt2 else tiny.LLAMA_TARGETS),
        orth_reg_weight=0.1,
        **options,
    )
    with tiny.seeded(3):
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if ".lora_E" in name:
                torch.nn.init.normal_(parameter)
                parameter.data[1] = 0.0  # pruned
    return model.train()


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert_classifier])
def test_a_step_is_pefts(build, monkeypatch):
    model = adapted(build)
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    layers = [m for m in model.modules() if type(m).__name__ == "SVDLinear"]
    assert sum(calls) == len(layers)
    unfuse(fused)
    assert not [m for m in fused.modules() if type(m).__name__.startswith("Fused")]


def test_the_divisor_is_that_of_the_layer_and_not_its_rank():
    """PEFT keeps it where triplets have been taken out of a module."""
    model = adapted(tiny.llama)
    for name, parameter in model.named_parameters():
        if ".ranknum" in name:
            parameter.data.fill_(7.0)
    assert_equal_steps(model, fused_copy(model))


def test_with_dropout_it_is_pefts_own_forward(monkeypatch):
    model = adapted(tiny.llama, dropout=0.5)
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused)
    assert not calls
