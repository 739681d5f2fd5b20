"""The fused LoRA step over base layers that bitsandbytes has quantised."""

import copy

import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, fused_copy, loss_and_gradients
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

bitsandbytes = pytest.importorskip("bitsandbytes")

CONFIGS = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"),
    "4bit-bfloat16": dict(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16"),
    "8bit": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide-llama")
    # Blocks of 64 numbers share a scale: narrower layers would not be quantised as real ones are.
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def adapted(folder, kind, dtype):
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**CONFIGS[kind]),
        dtype=dtype,
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return tiny.with_trained_b(tiny.adapted(model))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_loss_and_gradients_equal_those_of_peft(folder, kind, monkeypatch):
    model = adapted(folder, kind, torch.float32)
    fused = copy.deepcopy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused_copy(fused), tolerance=1e-4)
    assert calls == [1] * 14  # the base layer is called, and the update alone is fused
