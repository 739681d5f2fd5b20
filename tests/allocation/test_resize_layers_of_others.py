"""Layers of quantisers that have no small CPU path: PEFT's LoRA layer over a stand-in."""

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.resize import resize
from loralloc.kernels.lora import fuse

BATCH = tiny.causal_batch()


class Codes(nn.Module):
    """A frozen product from codes of 8 bits: no `weight`, as GPTQ's and AWQ's layers have none."""

    def __init__(self, linear):
        super().__init__()
        self.infeatures, self.outfeatures = (
            linear.in_features,
            linear.out_features,
        )  # as GPTQ has it
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).t()


@pytest.fixture(params=[GPTQLoraLinear, AwqLoraLinear])
def build(request, monkeypatch):
    """A backbone of such layers, on which PEFT puts its layer for them."""

    def dispatch(target, adapter_name, config, **kwargs):
        if isinstance(getattr(target, "base_layer", target), Codes):
            return request.param(target, adapter_name, config=config, **kwargs)

    monkeypatch.setattr(lora_model, f"dispatch_{request.param.__name__[:-10].lower()}", dispatch)

    def build():
        model = tiny.llama()
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, Codes(child))
        return model

    return build


@torch.no_grad()
def logits(model):
    return model.eval()(**BATCH).logits


def test_rounds_emptied_modules_and_saving(build, tmp_path):
    model = tiny.with_trained_b(tiny.adapted(build(), r=2))
    kinds = {type(layer) for layer in lora_layers(model).values()}
    assert len(kinds) == 1 and kinds <= {GPTQLoraLinear, AwqLoraLinear}
    assert fuse(model) == 0  # PEFT's own forward
    optimizer = tiny.optimizer_for(model)
    tiny.train(model, BATCH, 3, optimizer)
    allocator = Allocator(model, AllocationConfig(ranks_per_round=3), [BATCH])
    entry = allocator.step(optimizer)
    assert entry.ranks_after != entry.ranks_before
    tiny.train(model, BATCH, 3, optimizer)
    name = next(iter(lora_layers(model)))
    resize(model, {name: 0}, optimizer=optimizer)
    assert isinstance(model.get_base_model().get_submodule(name), Codes)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(build(), tmp_path)
    assert ranks(lora_layers(stock)) == ranks(lora_layers(model))
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)
