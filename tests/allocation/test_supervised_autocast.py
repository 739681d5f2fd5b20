"""The loss at supervised positions under autocast, as Accelerate gives a Trainer's model it."""

import copy

import pytest
import tiny
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.utils._python_dispatch import TorchDispatchMode

from loralloc.allocation.supervised import SupervisedLoss

HALF = torch.bfloat16


def adapted(seed=2):
    return tiny.with_trained_b(tiny.adapted(tiny.llama(tie_word_embeddings=False)), seed=seed)


def in_float32(model):
    return model


def in_bfloat16(model):
    model.get_base_model().to(HALF)
    return model


def with_norms_in_float32(model):
    """As models are prepared for training on quantised weights."""
    in_bfloat16(model)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.to(torch.float32)
    return model


BASES = (in_float32, in_bfloat16, with_norms_in_float32)


def prepared(model):
    """The model's forward under autocast, with outputs in float32."""

    def forward(**inputs):
        with torch.autocast("cpu", HALF):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def gradient(model):
    rows = [p.grad.flatten().double() for n, p in model.named_parameters() if "lora_" in n]
    return torch.cat(rows)


@pytest.mark.parametrize("base", BASES)
def test_loss_and_gradients_are_as_near_to_the_truth_as_those_of_the_model(base):
    squared = [0.0, 0.0]
    for seed in range(4):
        model, batch = base(adapted(seed)), tiny.causal_batch(seed=seed)
        exact = copy.deepcopy(model).float()
        exact(**batch).loss.backward()
        loss, truth = SupervisedLoss(model), gradient(exact)
        loss(batch, through=prepared(model))  # also shows what becomes of the logits
        ways = (
            lambda: loss(batch, through=prepared(model)).mean,  # noqa: B023
            lambda: prepared(model)(**batch).loss,  # noqa: B023
        )
        for index, way in enumerate(ways):
            model.zero_grad()
            found = way()
            found.backward()
            assert found.dtype == torch.float32
            squared[index] += float((gradient(model) - truth).norm() ** 2)
    assert squared[0] < 1.1**2 * squared[1] < (0.1 * truth.norm()) ** 2


@pytest.mark.parametrize("base", BASES)
def test_the_head_is_computed_with_the_loss_and_in_the_dtype_of_autocast(base):
    model, batch = base(adapted()), tiny.causal_batch()
    loss = SupervisedLoss(model)
    for _ in range(2):  # the first batch also shows what becomes of the logits
        with Products(tiny.VOCABULARY) as products:
            found = loss(batch, through=prepared(model))
        assert products.dtypes == {HALF}
        assert found.losses.dtype == torch.float32
    assert loss._passes_on


def test_within_autocast_it_is_the_same():
    model, batch = adapted(), tiny.causal_batch()
    loss = SupervisedLoss(model)
    expected = loss(batch, through=prepared(model)).losses
    with torch.autocast("cpu", HALF):
        got = loss(batch).losses
    assert torch.equal(got, expected)


class Products(TorchDispatchMode):
    """The dtypes of the logits that were multiplied out."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.dtypes = vocabulary, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and output.shape[-1] == self.vocabulary:
            self.dtypes.add(output.dtype)
        return output
