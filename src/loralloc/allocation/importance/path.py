"""The path from the base model (t = 0) to the trained one (t = 1) along the adapter's gates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loralloc.allocation.experts import over_ranks, ranked
from loralloc.allocation.objective import Objective
from loralloc.allocation.transfers import to_cpu


@contextmanager
def gates_at(weights_b: Mapping[str, Tensor], t: float) -> Iterator[dict[str, Tensor]]:
    """All gates at `t`: every B is multiplied by t inside, and its very bits are back outside.

    A gate multiplies a column of B (Liu et al. 2024, eq. 3), so scaling B is setting the gates.

    Yields:
        The trained B_m by module, shape (out_features, num_ranks).
    """
    if t == 1:
        yield {name: b.detach() for name, b in weights_b.items()}
        return
    trained = {name: b.detach().clone() for name, b in weights_b.items()}
    weights = list(weights_b.values())
    try:
        with torch.no_grad():
            torch._foreach_mul_(weights, t)
        yield trained
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, list(trained.values()))


def derivatives(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    points: Sequence[float],
    experts: Mapping[str, int] | None = None,
) -> list[tuple[dict[str, Tensor], float]]:
    """dS/dg of every rank with all gates at some points, by a backward pass over the batch each.

    With B_r the trained column, dS/dg_r = -<B_r, dL/dB_r> where the gradient is taken at t * B:
    it needs no gates in the model, and no gradient of A or anything else that trains. Gradients are
    asked for by name, so none is left in `.grad` and no hook of a distributed wrapper fires.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        points: The t on the path, 0 for the base model and 1 for the trained one.
        experts: As `Limits.experts`: a rank's gate is one for its columns of all experts.

    Returns:
        Of each point a float32 tensor of shape (num_ranks,) for each module, on the CPU, and S.
    """
    found = []
    with _of_b_only(objective, weights_b):
        for t in points:
            totals = {
                name: torch.zeros(b.shape[1], device=b.device) for name, b in weights_b.items()
            }
            loss = 0.0
            with gates_at(weights_b, t) as trained:
                for batch_loss, gradients in _passes(objective, weights_b):
                    loss += batch_loss
                    for name in totals:  # each is let go before the next pass
                        gradient = gradients.pop(name).float()
                        totals[name] -= (trained[name].float() * gradient).sum(dim=0)
            by_rank = {
                name: over_ranks(x, (experts or {}).get(name, 1)) for name, x in totals.items()
            }
            found.append((to_cpu(by_rank), -loss))
    return found


def gradient_norms(
    objective: Objective,
    weights_b: Mapping[str, Tensor],
    experts: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """|dL/dB_r| of every rank at the trained adapter, by one backward pass over the scoring batch.

    Args:
        objective: The scoring batch and the model.
        weights_b: B_m by module, shape (out_features, num_ranks), as in the model.
        experts: As `Limits.experts`: the gradient of a rank is by its columns of all experts.

    Returns:
        A float32 tensor of shape (num_ranks,) for each module, on the CPU.
    """
    totals = {name: torch.zeros_like(b, dtype=torch.float32) for name, b in weights_b.items()}
    with _of_b_only(objective, weights_b):
        for _, gradients in _passes(objective, weights_b):
            for name, gradient in gradients.items():
                totals[name] += gradient
    norms = {}
    for name, total in totals.items():
        columns, at = ranked(total, (experts or {}).get(name, 1), dim=1)
        norms[name] = columns.norm(dim=[dim for dim in range(columns.ndim) if dim != at])
    return to_cpu(norms)


@contextmanager
def _of_b_only(objective: Objective, weights_b: Mapping[str, Tensor]) -> Iterator[None]:
    """The model evaluates inside, and nothing trains but B."""
    # A loss that was given may switch the adapter off and on, and thaw it in the middle of a pass.
    others = () if objective.has_own_loss else _trainable_but(weights_b.values(), objective.model)
    with objective.evaluating(), frozen(others), torch.enable_grad():
        yield


def _passes(
    objective: Objective, weights_b: Mapping[str, Tensor]
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Of every micro-batch its share of the mean loss, and the gradient by each B_m."""
    for batch in objective.batches:
        loss = objective.loss_sum(batch) / objective.num_targets
        gradients = torch.autograd.grad(
            loss, list(weights_b.values()), allow_unused=True, materialize_grads=True
        )
        yield float(loss.detach()), dict(zip(weights_b, gradients, strict=True))
        del gradients  # the next pass needs the memory


def _trainable_but(wanted: Collection[Tensor], model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are not among these."""
    kept = {id(parameter) for parameter in wanted}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in kept]


@contextmanager
def frozen(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """No gradient inside for any of these."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
