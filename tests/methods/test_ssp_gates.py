"""SSP's probabilities, gates and choice: a worked example, and the slow reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ssp as reference

from loralloc.methods.ssp.gates import probabilities, relaxed_gates, shift, within_budget


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def spaces(draw):
    """Architecture weights and sizes of some units, and a budget below their sum."""
    units = draw(
        st.lists(st.tuples(st.floats(-8, 8), st.integers(1, 500)), min_size=2, max_size=12)
    )
    alphas, sizes = zip(*units, strict=True)
    return list(alphas), list(sizes), draw(st.integers(1, sum(sizes) - 1))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_worked_example(beta):
    # With zeta = 0, p = (3/4, 1/2), whose expected size is 3/4 * 4 + 1/2 * 8 = 7.
    alphas = numbers(beta * math.log(3), 0.0).requires_grad_()
    sizes, budget = numbers(4, 8), 7
    assert shift(alphas, sizes, budget, beta).item() == pytest.approx(0, abs=1e-6)
    p = probabilities(alphas, sizes, budget, beta)
    assert p.tolist() == pytest.approx([0.75, 0.5], abs=1e-6)
    # Slopes of the two sigmoids are 3/16 and 1/4 over beta; shares of the sum are 3/5 and 2/5.
    rows = [torch.autograd.grad(p[i], alphas, retain_graph=True)[0] * beta for i in range(2)]
    assert rows[0].tolist() == pytest.approx([0.1875 * 0.4, -0.25 * 0.6], abs=1e-6)
    assert rows[1].tolist() == pytest.approx([-0.1875 * 0.4, 0.25 * 0.6], abs=1e-6)


def test_a_gate_multiplies_the_odds_of_p_and_of_u():
    p = numbers(0.75, 0.75, 0.2).requires_grad_()
    z = relaxed_gates(p, numbers(0.75, 0.5, 0.5))
    assert z.tolist() == pytest.approx([0.9, 0.75, 0.2])
    # dz/dp = z (1 - z) / (p (1 - p))
    assert torch.autograd.grad(z.sum(), p)[0].tolist() == pytest.approx([0.09 / 0.1875, 1, 1])


def test_gates_are_finite_at_the_ends_of_their_ranges():
    alphas = numbers(400, 0, -400).requires_grad_()
    p = probabilities(alphas, numbers(2, 2, 2), 3)
    z = relaxed_gates(p, numbers(0, 0, 1 - 2**-53))
    (gradient,) = torch.autograd.grad(z.sum(), alphas)
    assert torch.isfinite(z).all()
    assert torch.isfinite(gradient).all()


def test_the_choice_goes_past_what_does_not_fit():
    assert within_budget(numbers(0.9, 0.8, 0.7, 0.6), [50, 60, 40, 10], 100) == [0, 2, 3]
    assert within_budget(numbers(0.5, 0.5, 0.5), [50, 50, 50], 100) == [0, 1]


@given(spaces(), st.floats(0.5, 3), st.integers(0, 2**31))
def test_as_the_reference_has_it(space, beta, seed):
    alphas, sizes, budget = space
    weights = numbers(*alphas).requires_grad_()
    p = probabilities(weights, numbers(*sizes), budget, beta)
    expected = reference.probability(alphas, sizes, budget, beta)
    assert p.tolist() == pytest.approx(expected, abs=2e-7)
    assert float(p.detach() @ numbers(*sizes)) == pytest.approx(budget, abs=1e-6 * sum(sizes))

    if all(1e-6 < value < 1 - 1e-6 for value in expected):
        for of in range(len(alphas)):
            row = torch.autograd.grad(p[of], weights, retain_graph=True)[0]
            slow = [reference.derivative(expected, of, by, beta) for by in range(len(alphas))]
            assert row.tolist() == pytest.approx(slow, abs=1e-6)

        u = torch.rand(len(alphas), dtype=torch.float64, generator=_generator(seed)) * 0.98 + 0.01
        slow = [reference.gate(*pair) for pair in zip(expected, u.tolist(), strict=True)]
        assert relaxed_gates(p, u).tolist() == pytest.approx(slow, abs=1e-5)

    kept = within_budget(p, sizes, budget)
    assert set(kept) == reference.choice(p.tolist(), sizes, budget)
    left = budget - sum(sizes[index] for index in kept)
    assert left >= 0
    assert all(sizes[index] > left for index in range(len(sizes)) if index not in kept)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
