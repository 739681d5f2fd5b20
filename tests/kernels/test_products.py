"""The product with a frozen weight is the same whichever library multiplies."""

import pytest
import torch
from torch.nn import functional

from loralloc.kernels import products as module
from loralloc.kernels.products import linear, mkl_is_slow

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch carries no oneDNN"
)
SLOW = [pytest.param(True, marks=needs_onednn), False]


@pytest.fixture(params=SLOW, ids=["onednn", "mkl"])
def is_slow(request, monkeypatch):
    monkeypatch.setattr(module, "mkl_is_slow", lambda: request.param)
    return request.param


def tensors(*shape, num_out=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(size, generator=generator).to(dtype)
        for size in (shape, (num_out, shape[-1]), (num_out,))
    )


@pytest.mark.parametrize("has_bias", [False, True])
def test_is_as_near_to_the_truth_as_pytorch(is_slow, has_bias):
    x, weight, bias = tensors(64, 300, num_out=200)
    bias = bias if has_bias else None
    truth = functional.linear(*(t if t is None else t.double() for t in (x, weight, bias)))
    ours, theirs = (
        (function(x, weight, bias) - truth).norm() for function in (linear, functional.linear)
    )
    assert ours < 2 * theirs < 1e-5 * truth.norm()


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_takes_any_number_of_tokens(is_slow, num_tokens, has_bias):
    x, weight, bias = tensors(num_tokens, 6)
    bias = bias if has_bias else None
    torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_takes_transposed_and_strided_tensors(is_slow):
    x, weight, _ = tensors(12, 6)
    for x_i in (x[::2], x.t().contiguous().t(), x[:1].expand(5, 6)):
        torch.testing.assert_close(linear(x_i, weight), functional.linear(x_i, weight))
    y, _, _ = tensors(4, 7)
    torch.testing.assert_close(linear(y, weight.t()), y @ weight)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what oneDNN's own function was called with."""
    shapes, product = [], torch.ops.mkldnn._linear_pointwise

    def counted(x, *args):
        shapes.append(x.shape)
        return product(x, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return shapes


@needs_onednn
def test_onednn_is_called_for_float32_where_mkl_is_slow_only(calls, monkeypatch):
    for is_slow in (True, False):
        monkeypatch.setattr(module, "mkl_is_slow", lambda is_slow=is_slow: is_slow)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            linear(*tensors(4, 6, dtype=dtype))
        assert linear(*(t.to("meta") for t in tensors(4, 6))).shape == (4, 7)
        linear(*tensors(0, 6))
    assert calls == [(4, 6)]


@pytest.mark.parametrize(
    ("text", "is_slow"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)],
)
def test_mkl_is_slow_on_processors_of_amd(text, is_slow, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(module, "CPUINFO", path)
    for library in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert mkl_is_slow.__wrapped__() is is_slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not mkl_is_slow.__wrapped__()
