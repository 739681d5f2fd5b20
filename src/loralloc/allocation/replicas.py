"""The only place that knows of several processes: they score each, and decide as one.

Between score, plan and resize of a round every process takes the same step: scores are averaged,
the first process's plan is everyone's, and afterwards all adapters must be the same. In one process
nothing happens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from loralloc.allocation.optimizer_state import Weights
from loralloc.allocation.policy import Plan, Scores


def count() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean(scores: Scores) -> Scores:
    """The mean of what the processes measured, the same bits in each.

    A rank counts as verified where every process verified it, and the round as settled where it is
    for all.

    Args:
        scores: Of this process, on its part of the scoring batch.
    """
    if count() == 1:
        return scores
    sums = (scores.s_full, scores.s_base)
    measured = [s for s in sums if s is not None]
    parts = [x for by_module in scores.terms.values() for x in by_module.values()]
    numbers = torch.cat(
        [torch.tensor(measured, dtype=torch.float64), *(x.detach().double().cpu() for x in parts)]
    )
    together = _gathered((numbers, scores.verified, scores.settled))
    average = torch.stack([each for each, _, _ in together]).mean(dim=0)
    split = iter(torch.split(average, [len(measured), *map(len, parts)]))
    first = iter(next(split).tolist())
    s_full, s_base = (None if s is None else next(first) for s in sums)
    verified = {
        name: tuple(sorted(set(own).intersection(*(of.get(name, ()) for _, of, _ in together))))
        for name, own in scores.verified.items()
    }
    return dataclasses.replace(
        scores,
        terms={
            term: {name: next(split).to(x) for name, x in by_module.items()}
            for term, by_module in scores.terms.items()
        },
        s_full=s_full,
        s_base=s_base,
        verified={name: indices for name, indices in verified.items() if indices},
        settled=all(settled for _, _, settled in together),
    )


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of what the processes measured, the same bits in each.

    Args:
        tensors: Of this process, of the same names and shapes in all.
    """
    if count() == 1:
        return dict(tensors)
    together = _gathered({name: value.detach().cpu() for name, value in tensors.items()})
    return {
        name: torch.stack([each[name] for each in together]).mean(dim=0).to(value)
        for name, value in tensors.items()
    }


def agreed(plan: Plan) -> Plan:
    """The first process's plan.

    Args:
        plan: Of this process.
    """
    if count() == 1:
        return plan
    plans: list[Any] = [plan]
    dist.broadcast_object_list(plans, src=0)
    first: Plan = plans[0]
    return first


def check_equal(weights: Weights, optimizer: Optimizer | None) -> None:
    """Stop the run where the adapters of two processes differ, or what their optimisers keep.

    Processes whose adapters have grown apart go on without an error, each training another model.

    Args:
        weights: The adapter's A and B by module, which are compared to the last bit.
        optimizer: What trains them; the places of the weights in its groups and the shapes of its
            state are compared.

    Raises:
        RuntimeError: They differ; the first such tensor is named.
    """
    if count() == 1:
        return
    together = _gathered(dict(_described(weights, optimizer)))
    first = together[0]
    for process, other in enumerate(together):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise RuntimeError(
                    f"After a round of allocation {name} is not the same in processes 0 and "
                    f"{process}, so that each would train another model; seed all processes alike "
                    "and give them the same adapter, and resume from the last checkpoint."
                )


def _described(weights: Weights, optimizer: Optimizer | None) -> Iterator[tuple[str, Any]]:
    """A name and a description of everything that is to be equal."""
    for name, pair in weights.items():
        for part, weight in zip("AB", pair, strict=True):
            yield f"lora_{part} of {name}", (tuple(weight.shape), str(weight.dtype), _hash(weight))
            if optimizer is not None:
                yield f"the optimiser's state of lora_{part} of {name}", _kept(optimizer, weight)


def _kept(optimizer: Optimizer, weight: Tensor) -> tuple[Any, ...]:
    """Where a weight stands in an optimiser, and the shapes of what is kept of it."""
    places = [
        (number, slot)
        for number, group in enumerate(optimizer.param_groups)
        for slot, param in enumerate(group["params"])
        if param is weight
    ]
    state: Mapping[str, Any] = optimizer.state.get(weight, {})
    shapes = {key: tuple(x.shape) for key, x in state.items() if isinstance(x, Tensor)}
    return (places, shapes)


def _hash(tensor: Tensor) -> str:
    values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()


def _gathered(value: Any) -> list[Any]:
    """What each process gives, in their order."""
    together: list[Any] = [None] * count()
    dist.all_gather_object(together, value)
    return together
