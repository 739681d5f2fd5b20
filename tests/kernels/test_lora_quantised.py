"""The fused LoRA step over base layers that bitsandbytes has quantised."""

import kbit
import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, fused_copy

CONFIGS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kbit.save_wide(tmp_path_factory.mktemp("wide-llama"))


def adapted(folder, kind, dtype):
    return tiny.with_trained_b(tiny.adapted(kbit.llama(folder, kind, dtype)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_loss_and_gradients_equal_those_of_peft(folder, kind, dtype, tolerance, monkeypatch):
    model = adapted(folder, kind, dtype)
    classes = {type(module).__name__ for module in model.modules()}
    assert classes & {"Linear4bit", "Linear8bitLt"}
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    assert_equal_steps(model, fused, tolerance=tolerance)
    assert calls == [1] * 14  # the base layer is called, and the update alone is fused


@pytest.mark.parametrize("kind", CONFIGS)
def test_under_autocast_they_equal_those_of_peft_to_rounding(folder, kind, monkeypatch):
    model = adapted(folder, kind, torch.bfloat16)
    fused = fused_copy(model)
    calls = Calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_steps(model, fused, tolerance=0.1)
    assert calls == [1] * 14
