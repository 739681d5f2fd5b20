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
    """The last query sees every key."""
    return torch.ones(length, num_keys, dtype=torch.bool).tril(num_keys - length)[None, None]


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
    """As Transformers does it where it leaves it to no kernel."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=scores.dtype if query.is_leaf else None)
    return probabilities.to(query.dtype) @ value


def output_and_gradients(function, query, key, value, grad, mask):
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves, mask)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "num_keys"), [(5, 5), (2, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_pytorch_in_float32(groups, length, num_keys, mask):
    if mask is causal and length > num_keys:
        pytest.skip("the first queries see nothing")
    args = (*tensors(groups, length, num_keys), mask(length, num_keys))
    got = output_and_gradients(with_short_attention, *args)
    torch.testing.assert_close(got, output_and_gradients(with_pytorch, *args))
