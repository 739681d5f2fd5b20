"""Attention over short sequences equals PyTorch's, forward and backward."""

import pytest
import torch
from torch.nn import functional

from loralloc.kernels.attention import short_attention

SCALE = 0.3


def tensors(groups, length, num_keys, dtype=torch.float32):
    """Query, key, value and the gradient of the output, for 3 examples and 4 heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, length, 8), (groups, num_keys, 8), (groups, num_keys, 6), (4, length, 6)
    return [torch.randn(3, *shape, generator=generator).to(dtype) for shape in shapes]


def causal(length, num_keys):
    """The last query sees every key, the first at least one."""
    ones = torch.ones(length, num_keys, dtype=torch.bool)
    return ones.tril(max(0, num_keys - length))[None, None]


def padding(length, num_keys, *, left):
    """Three examples of 1, 2 and all keys."""
    seen = torch.arange(num_keys) < torch.tensor([1, 2, num_keys])[:, None]
    return (seen.flip(1) if left else seen)[:, None, None].expand(-1, 1, length, -1)


def each_head(length, num_keys):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 4, length, num_keys, generator=generator) < 0.5
    mask[..., 0] = True
    return mask


MASKS = {
    "none": lambda length, keys: None,
    "causal": causal,
    "right": lambda length, keys: padding(length, keys, left=False),
    "left": lambda length, keys: padding(length, keys, left=True),
    "causal-right": lambda *size: padding(*size, left=False) & causal(*size),
    "each-head": each_head,
}


def with_short_attention(query, key, value, mask):
    return short_attention(query, key, value, mask, SCALE)


def with_pytorch(query, key, value, mask):
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )


def written_out(query, key, value, mask):
    """As Transformers does it where no kernel is to be had."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def output_and_gradients(function, query, key, value, grad, mask):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves, mask)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "num_keys"), [(5, 5), (2, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_pytorch_in_float32(groups, length, num_keys, mask):
    args = (*tensors(groups, length, num_keys), mask(length, num_keys))
    got = output_and_gradients(with_short_attention, *args)
    torch.testing.assert_close(got, output_and_gradients(with_pytorch, *args))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_other_ways_without_a_kernel(groups, mask):
    args = (*tensors(groups, 40, 40, torch.bfloat16), mask(40, 40))
    exact = [t if t is None or t.dtype == torch.bool else t.double() for t in args]
    truth = output_and_gradients(with_pytorch, *exact)
    errors = [
        [
            float((t.double() - t_i).norm() / t_i.norm())
            for t, t_i in zip(tensors_i, truth, strict=True)
        ]
        for tensors_i in (
            output_and_gradients(with_short_attention, *args),
            output_and_gradients(written_out, *args),
        )
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.1 * theirs < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_is_finite_and_disturbs_no_other(dtype):
    *inputs, grad = tensors(2, 5, 5, dtype)
    mask = causal(5, 5).repeat(3, 1, 1, 1)
    mask[0, :, :2] = False  # as the padding on the left of a causal model
    grad[0, :, :2] = 0  # that no loss is taken on
    got = output_and_gradients(with_short_attention, *inputs, grad, mask)
    expected = output_and_gradients(with_pytorch, *inputs, grad, mask)
    assert all(tensor.isfinite().all() for tensor in got)
    for tensor in (got[0], expected[0]):
        tensor[0, :, :2] = 0
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_inputs_need_not_be_contiguous():
    query, key, value, grad = tensors(2, 5, 5)
    args = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value, grad)]
    got = output_and_gradients(with_short_attention, *args, causal(5, 5))
    torch.testing.assert_close(got, output_and_gradients(with_pytorch, *args, causal(5, 5)))


def test_neither_scores_nor_probabilities_are_kept():
    query, key, value, _ = tensors(2, 64, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        short_attention(query.requires_grad_(), key, value, causal(64, 64), SCALE)
    floats = [tensor.numel() for tensor in kept if tensor.is_floating_point()]
    assert sum(floats) == query.numel() + key.numel() + value.numel()


def test_a_second_derivative_is_refused():
    query, key, value, _ = tensors(2, 5, 5)
    output = short_attention(query.requires_grad_(), key, value, None, SCALE)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
