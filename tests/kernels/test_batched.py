"""K updates at once are K updates, one block of rows each."""

import pytest
import tiny
import torch
from torch import nn

from loralloc.kernels.batched import BlockedLinear, BlockedModule, Blocks, batched_update

K, TOKENS, IN, OUT = 3, 5, 6, 4


def drawn(ranks, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_()

    a, b = [normal(r, IN) for r in ranks], [normal(OUT, r) for r in ranks]
    return normal(K, TOKENS, IN), normal(K, TOKENS, OUT), a, b


SCALINGS = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2), (0, 3, 1)])
def test_an_update_is_that_of_its_own_adapter(ranks):
    x, base, a, b = drawn(ranks)
    y = batched_update(x, base, a, b, SCALINGS)
    for k in range(K):
        expected = base[k] + SCALINGS[k] * (x[k] @ a[k].T @ b[k].T)
        torch.testing.assert_close(y[k], expected)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2), (0, 3, 1)])
def test_gradients_are_those_of_the_formula(ranks):
    x, base, a, b = drawn(ranks)
    assert torch.autograd.gradcheck(
        lambda x, base, *weights: batched_update(x, base, weights[:K], weights[K:], SCALINGS),
        (x, base, *a, *b),
    )


def test_half_precision_is_the_same_to_rounding():
    x, base, a, b = drawn((1, 3, 2), torch.float32)
    exact = batched_update(x, base, a, b, SCALINGS.float())
    half = batched_update(x.bfloat16(), base.bfloat16(), a, b, SCALINGS.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.1)
    half.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in (*a, *b))


def layers(*ranks):
    """The same linear layer under LoRA of several ranks, in models of their own."""
    models = [tiny.with_trained_b(tiny.adapted(tiny.llama(), r=r), seed=r) for r in ranks]
    return [model.get_base_model().model.layers[0].mlp.up_proj for model in models]


def test_each_block_goes_through_its_own_layer():
    each, blocks = layers(2, 4, 3), Blocks()
    joint = BlockedLinear(each, blocks)
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))
    blocks.adapters, blocks.num_rows = (2, 0), 4
    expected = torch.cat([each[2](x[:2]), each[0](x[2:])])
    torch.testing.assert_close(joint(x), expected)
    torch.testing.assert_close(joint(x.flatten(0, 1)), expected.flatten(0, 1))


def test_ranks_that_change_are_followed():
    each, blocks = layers(2, 4), Blocks(adapters=(0, 1), num_rows=2)
    joint = BlockedLinear(each, blocks)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for layer, rank in zip(each, (0, 1), strict=True):
        layer.lora_A["default"].weight = nn.Parameter(torch.ones(rank, 32))
        layer.lora_B["default"].weight = nn.Parameter(torch.ones(48, rank))
    first, second = joint(x)
    torch.testing.assert_close(first, each[0].base_layer(x[0]))
    torch.testing.assert_close(second, each[1](x[1]))


def test_rows_that_are_not_the_batch_are_refused():
    joint = BlockedLinear(layers(2, 4), Blocks(adapters=(0, 1), num_rows=4))
    with pytest.raises(TypeError, match=r"reads \(6, 32\) of a batch of 4 rows.*one by one"):
        joint(torch.zeros(6, 32))


def test_a_module_that_trains_is_each_runs_own():
    each, blocks = [nn.Linear(3, 2) for _ in range(3)], Blocks(adapters=(0, 2), num_rows=4)
    joint = BlockedModule(each, blocks)
    x = torch.randn(4, 3)
    torch.testing.assert_close(joint(x), torch.cat([each[0](x[:2]), each[2](x[2:])]))
    assert not list(joint.parameters())
