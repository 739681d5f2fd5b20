"""One training step of an adapted model and of its fused copy, side by side."""

import copy

import pytest
import tiny
import torch

from loralloc.kernels import lora
from loralloc.kernels.lora import fuse


def fused_copy(model):
    fused = copy.deepcopy(model)
    assert fuse(fused) > 0
    return fused


def loss_and_gradients(model, batch=None):
    model.zero_grad()
    with tiny.seeded(2):  # dropout draws the same
        loss = model(**(batch or batch_for(model))).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batch_for(model):
    batch = tiny.batch_for(model)
    if model.config.is_encoder_decoder:
        batch["labels"] = batch["input_ids"][:, :5].clone()  # shorter than what is read
    return batch


def assert_equal_steps(model, other, *, tolerance=1e-5, batch=None):
    loss, gradients = loss_and_gradients(model, batch)
    other_loss, other_gradients = loss_and_gradients(other, batch)
    assert gradients.keys() == other_gradients.keys() and gradients
    torch.testing.assert_close(other_loss, loss, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        difference = (other_gradients[name] - gradient).norm()
        assert difference <= tolerance * gradient.norm().clamp(min=1e-7), name
        assert other_gradients[name].dtype == gradient.dtype


class Calls(list):
    """How many layers each call of a fused function computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        apply = lora._apply

        def counted(function, *args):
            self.append(len(args[1].bt) if function is lora._LoraLinears else 1)
            return apply(function, *args)

        monkeypatch.setattr(lora, "_apply", counted)
