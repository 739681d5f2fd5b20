"""Choosing a candidate by what the network does without it, and with it alone.

    CS(o) = S(M) - S(M without o) + S(M with only o)

S is minus the mean loss on the scoring batch; o is left out of, or is all of, one mean in one
adapter of the hyper-network M, the rest of which stays as it is. Let e be how far that mean of n
candidates is moved towards each: only o is e_o = 1, without o is e_o = -1 / (n - 1). So to first
order, from one backward pass for all candidates of all adapters,

    CS(o) ~ S(M) + n / (n - 1) dS/de_o  at e = 0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loralloc.allocation.importance.prefix import Prefix
from loralloc.allocation.objective import Objective
from loralloc.methods.learned_adapter.cell import Cell

CHOICES = ("activations", "operations")
"""What is chosen in a cell, as its attributes are named."""

Scores = dict[str, dict[str, float]]
"""CS by choice and candidate."""


def by_gradient(objective: Objective, cells: Mapping[str, Cell]) -> dict[str, Scores]:
    """CS of every candidate in these cells, to first order.

    Args:
        objective: The scoring batch and the model.
        cells: By their names in the model.
    """
    plain = 0.0
    with _leanings(cells) as leanings, objective.evaluating(), torch.enable_grad():
        derivatives = {key: torch.zeros_like(leaning) for key, leaning in leanings.items()}
        for batch in objective.batches:
            loss = objective.loss_sum(batch)
            plain += float(loss.detach())
            found = torch.autograd.grad(loss, list(leanings.values()))
            for key, derivative in zip(leanings, found, strict=True):
                derivatives[key] += derivative
    scores: dict[str, Scores] = {name: {} for name in cells}
    for (name, choice), derivative in derivatives.items():
        candidates = getattr(cells[name], choice)
        weight = len(candidates) / (len(candidates) - 1)
        scores[name][choice] = {
            candidate: -(plain + weight * value) / objective.num_targets
            for candidate, value in zip(candidates, derivative.tolist(), strict=True)
        }
    return scores


def by_ablation(objective: Objective, cells: Mapping[str, Cell]) -> dict[str, Scores]:
    """CS of every candidate in these cells, exactly.

    What comes before a cell's block is the same for all of its candidates, and is computed once.

    Args:
        objective: The scoring batch and the model.
        cells: By their names in the model.
    """
    plain = 0.0
    scores: dict[str, Scores] = {
        name: {choice: dict.fromkeys(getattr(cell, choice), 0.0) for choice in CHOICES}
        for name, cell in cells.items()
    }
    prefix = Prefix(objective.model, cells)
    with objective.evaluating(), torch.no_grad():
        for batch in objective.batches:
            with prefix.recording() as recording:
                plain += float(objective.loss_sum(batch))
            for name, choice, candidate, others in _candidates(cells):
                with prefix.replaying(recording, before=recording.start(name)):
                    with _only(cells[name], choice, others):
                        without = float(objective.loss_sum(batch))
                    with _only(cells[name], choice, [candidate]):
                        alone = float(objective.loss_sum(batch))
                scores[name][choice][candidate] += without - alone
    for name, choice, candidate, _ in _candidates(cells):
        found = scores[name][choice]
        found[candidate] = (found[candidate] - plain) / objective.num_targets
    return scores


def best(scores: Scores) -> dict[str, str]:
    """The candidate with the highest score of every choice; of equals, the first."""
    return {choice: max(found, key=found.__getitem__) for choice, found in scores.items()}


@contextmanager
def _leanings(cells: Mapping[str, Cell]) -> Iterator[dict[tuple[str, str], Tensor]]:
    """The numbers e by cell and choice, all 0, for derivatives to be taken by them."""
    for cell in cells.values():
        cell.leanings = {
            choice: cell.up.new_zeros(len(getattr(cell, choice))).requires_grad_()
            for choice in CHOICES
        }
    try:
        yield {(name, choice): cells[name].leanings[choice] for name in cells for choice in CHOICES}
    finally:
        for cell in cells.values():
            cell.leanings = {}


def _candidates(cells: Mapping[str, Cell]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Cell, choice, candidate, and the others that there are."""
    for name, cell in cells.items():
        for choice in CHOICES:
            candidates = getattr(cell, choice)
            for candidate in candidates:
                yield name, choice, candidate, [other for other in candidates if other != candidate]


@contextmanager
def _only(cell: Cell, choice: str, candidates: Sequence[str]) -> Iterator[None]:
    """Nothing but these to choose from."""
    all_of_them = getattr(cell, choice)
    setattr(cell, choice, candidates)
    try:
        yield
    finally:
        setattr(cell, choice, all_of_them)
