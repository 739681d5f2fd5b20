"""The head with its cross-entropy, a few rows at a time, equals both in one piece."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from loralloc.kernels import cross_entropy
from loralloc.kernels.cross_entropy import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 10, 6, 37


@pytest.fixture(params=[1, 3, TOKENS, 1000])
def rows(request, monkeypatch):
    """Rows of logits held at once."""
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", {"cpu": request.param * VOCABULARY})
    return request.param


def tensors(num_tokens=TOKENS, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (torch.randn(shape, generator=generator) * scale).to(dtype)
        for shape in ((num_tokens, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    targets[::2] = functional.linear(hidden, weight, bias).argmax(1)[::2]  # so that some are right
    return hidden.requires_grad_(), weight, targets, bias


def in_one_piece(hidden, weight, targets, bias=None):
    logits = functional.linear(hidden, weight, bias).float()
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return losses, (logits.argmax(1) == targets).sum()


@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_gradient_and_right_answers_equal_those_of_full_logits(rows, has_bias):
    results = []
    for function in (in_one_piece, linear_cross_entropy):
        hidden, weight, targets, bias = tensors()
        losses, correct = function(hidden, weight, targets, bias if has_bias else None)
        (losses * torch.arange(TOKENS)).sum().backward()  # each token weighs something else
        results.append((losses, correct, hidden.grad))
    torch.testing.assert_close(*results)
    assert results[0][1] >= (TOKENS // 2 if has_bias else 1)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_autograd(rows):
    def mean_and_gradient(function, dtype):
        hidden, weight, targets, _ = tensors(300)
        hidden = hidden.detach().to(torch.bfloat16).to(dtype).requires_grad_()
        losses, _ = function(hidden, weight.to(torch.bfloat16).to(dtype), targets)
        loss = losses.mean()
        loss.backward()
        return torch.cat([loss.detach().view(1).double(), hidden.grad.flatten().double()])

    def in_double(hidden, weight, targets):
        logits = hidden @ weight.t()
        return functional.cross_entropy(logits, targets, reduction="none"), None

    truth = mean_and_gradient(in_double, torch.float64)
    autograd = (mean_and_gradient(in_one_piece, torch.bfloat16) - truth).abs()
    ours = (mean_and_gradient(linear_cross_entropy, torch.bfloat16) - truth).abs()
    assert ours[0] <= autograd[0] + 1e-6
    assert ours[1:].norm() <= 1.1 * autograd[1:].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_cast_before", [False, True])
def test_under_autocast_logits_are_in_its_dtype_and_losses_in_float32(dtype, is_cast_before, rows):
    results = []
    for function in (in_one_piece, linear_cross_entropy):
        hidden, weight, targets, bias = tensors(300)
        weight, bias = weight.to(dtype), bias.to(dtype)
        read = hidden.to(torch.bfloat16) if is_cast_before else hidden
        with torch.autocast("cpu", torch.bfloat16):
            losses, correct = function(read, weight, targets, bias)
        losses.sum().backward()
        results.append((losses, correct, hidden.grad))
    assert results[1][0].dtype == torch.float32 == results[1][2].dtype
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_a_head_of_another_dtype_than_its_input_is_taken_in_that_of_the_input():
    hidden, weight, targets, bias = tensors(300)
    hidden = hidden.detach().to(torch.bfloat16)
    expected = linear_cross_entropy(hidden, weight.bfloat16(), targets, bias.bfloat16())
    got = linear_cross_entropy(hidden, weight, targets, bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9])
def test_of_equal_logits_the_first_is_the_answer_as_argmax_has_it(width, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 4)
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(3, (200, width), generator=generator).float()
    targets = torch.randint(width, (200,), generator=generator)
    for z in (logits, torch.zeros_like(logits), logits.neg(), logits.bfloat16().float()):
        hidden, weight = z, torch.eye(width)
        _, correct = linear_cross_entropy(hidden, weight, targets)
        assert int(correct) == int((z.argmax(1) == targets).sum())


def test_the_factor_of_the_loss_is_not_rounded_to_bfloat16():
    gradients = []
    for factor in (1.0, 1 / 3):
        hidden, weight, targets, _ = tensors(300, torch.bfloat16)
        (linear_cross_entropy(hidden, weight, targets)[0] * factor).sum().backward()
        gradients.append(hidden.grad)
    whole, third = gradients
    assert torch.equal(third, (whole.float() / 3).to(torch.bfloat16))


def test_large_logits_stay_finite(rows):
    hidden, weight, targets, _ = tensors(scale=100.0)  # logits of about 1e4
    losses, _ = linear_cross_entropy(hidden, weight, targets)
    losses.sum().backward()
    expected, _ = in_one_piece(hidden.detach(), weight, targets)
    torch.testing.assert_close(losses.detach(), expected)
    assert hidden.grad.isfinite().all() and expected.sum() > 1e4


def test_without_a_gradient_none_is_computed():
    hidden, weight, targets, bias = tensors()
    expected = in_one_piece(hidden, weight, targets, bias)
    for frozen in (hidden.detach(), hidden):
        with torch.no_grad():
            got = linear_cross_entropy(frozen, weight, targets, bias)
        torch.testing.assert_close(got, tuple(t.detach() for t in expected))
        assert got[0].grad_fn is None
    assert linear_cross_entropy(hidden.detach(), weight, targets)[0].grad_fn is None


def test_no_row_at_all():
    hidden, weight, targets, _ = tensors(0)
    losses, correct = linear_cross_entropy(hidden, weight, targets)
    losses.sum().backward()
    assert (losses.shape, int(correct), hidden.grad.shape) == ((0,), 0, (0, WIDTH))


def test_a_second_derivative_is_refused():
    hidden, weight, targets, _ = tensors()
    losses, _ = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(losses.sum().square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Rows of the largest tensor of logits that was made."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape[-1:] == (VOCABULARY,):
            is_weight = function.is_view  # transposed
            self.rows = max(self.rows, 0 if is_weight else output.shape[0])
        return output


def test_no_more_rows_are_held_than_asked(rows):
    hidden, weight, targets, _ = tensors()
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets)[0].sum().backward()
    assert largest.rows == min(rows, TOKENS)
