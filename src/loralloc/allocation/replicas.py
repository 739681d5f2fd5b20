"""The only place that knows of several processes: they measure alike, and decide as one.

Every process holds the same adapter, and whatever decides over it comes from the first process or
is averaged over all: scores, plans, new rows, gradients of what trains beside the model. Afterwards
all adapters must be the same, to the last bit. In one process nothing happens.

All functions but `count`, `index` and `is_first` are for all processes to call, in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from loralloc.allocation.optimizer_state import Weights
from loralloc.allocation.policy import Scores

T = TypeVar("T")


def count() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that decides, and speaks for all."""
    return index() == 0


def mean(scores: Scores) -> Scores:
    """The mean of what the processes measured, the same bits in each.

    A rank counts as verified where every process verified it, and the round as settled where it is
    for all.

    Args:
        scores: Of this process. Processes measure on the same scoring batch, all of it, so that
            they take equally many passes through a model that may be spread over them.
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
    flat = [value.detach().double().flatten().cpu() for value in tensors.values()]
    parts = torch.split(_sum(torch.cat(flat)) / count(), list(map(len, flat)))
    return {
        name: part.view(value.shape).to(value)
        for (name, value), part in zip(tensors.items(), parts, strict=True)
    }


def total(number: float) -> float:
    """The sum of a number over the processes."""
    if count() == 1:
        return number
    return float(_sum(torch.tensor([number], dtype=torch.float64)))


def weight(number: float) -> float:
    """What a mean over so many things is to be multiplied by before the processes' are averaged.

    The average is then the mean over the things of all processes, however they lie.
    """
    return 1.0 if count() == 1 else number * count() / max(total(number), 1)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return flag if count() == 1 else total(flag) > 0


def together(action: Callable[[], T]) -> T:
    """Carry out an action in every process; what one raises, all raise.

    Args:
        action: May do nothing in some of them.
    """
    if count() == 1:
        return action()
    value, error = None, None
    try:
        value = action()
    except Exception as raised:
        error = raised
    errors = [each for each in _gathered(error and _sendable(error)) if each is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
    return cast("T", value)


def gathered(value: T) -> list[T]:
    """What each process gives, in their order."""
    return [value] if count() == 1 else _gathered(value)


def agreed(value: T) -> T:
    """The first process's value: a plan, or anything else that can be pickled.

    Args:
        value: Of this process.
    """
    if count() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    first: T = values[0]
    return first


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give tensors that were drawn in every process the first one's values, in place."""
    if count() == 1:
        return
    for tensor in tensors:
        there = tensor.detach().to(_device(), copy=True).contiguous()
        dist.broadcast(there, src=0)
        tensor.copy_(there)


@torch.no_grad()
def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Average the gradients of tensors that no wrapper of the model knows, in place.

    One that has a gradient in no process is left without; where it has one in some, it is zero in
    the others.
    """
    if count() == 1 or not tensors:
        return
    given = torch.tensor([tensor.grad is not None for tensor in tensors], dtype=torch.float64)
    flat = [
        (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).double().flatten().cpu()
        for tensor in tensors
    ]
    found = _sum(torch.cat([given, *flat]))
    have, *parts = torch.split(found, [len(given), *map(len, flat)])
    for tensor, has, part in zip(tensors, have.tolist(), parts, strict=True):
        if has:
            tensor.grad = (part / count()).view(tensor.shape).to(tensor)


def check_equal(
    tensors: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    *,
    when: str = "After a round of allocation",
) -> None:
    """Stop the run where the adapters of two processes differ, or what their optimisers keep.

    Processes whose adapters have grown apart go on without an error, each training another model.

    Args:
        tensors: What trains, by name; compared to the last bit.
        optimizer: What trains them; the places of the tensors in its groups and its state of them
            are compared too.
        when: Begins the message.

    Raises:
        RuntimeError: They differ; the first such tensor is named.
    """
    if count() == 1:
        return
    together = _gathered(dict(_described(tensors, optimizer)))
    first = together[0]
    for process, other in enumerate(together):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise RuntimeError(
                    f"{when} {name} is not the same in processes 0 and {process}, so that each "
                    "would train another model; seed all processes alike and give them the same "
                    "adapter, and resume from the last checkpoint."
                )


def by_part(weights: Weights) -> dict[str, Tensor]:
    """The A and B of modules by the names under which `check_equal` tells of them."""
    return {
        f"lora_{part} of {name}": weight
        for name, pair in weights.items()
        for part, weight in zip("AB", pair, strict=True)
    }


def _described(
    tensors: Mapping[str, Tensor], optimizer: Optimizer | None
) -> Iterator[tuple[str, Any]]:
    """A name and a description of everything that is to be equal."""
    places = _places(optimizer)
    for name, tensor in tensors.items():
        yield name, _description(tensor)
        if optimizer is not None:
            state: Mapping[str, Any] = optimizer.state.get(tensor, {})
            kept = {key: _description(x) for key, x in state.items() if isinstance(x, Tensor)}
            yield f"the optimiser's state of {name}", (places.get(id(tensor), []), kept)


def _places(optimizer: Optimizer | None) -> dict[int, list[tuple[int, int]]]:
    """Where each parameter stands in an optimiser: its groups and places in them."""
    places: dict[int, list[tuple[int, int]]] = {}
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        for slot, param in enumerate(group["params"]):
            places.setdefault(id(param), []).append((number, slot))
    return places


def _description(tensor: Tensor) -> tuple[Any, ...]:
    values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    hashed = hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()
    return (tuple(tensor.shape), str(tensor.dtype), hashed)


def _gathered(value: Any) -> list[Any]:
    """What each process gives, in their order."""
    together: list[Any] = [None] * count()
    dist.all_gather_object(together, value)
    return together


def _sendable(error: Exception) -> Exception:
    """An error that other processes can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class may refuse to be pickled with anything
        return RuntimeError(str(error))
    return error


def _sum(numbers: Tensor) -> Tensor:
    """Numbers on the CPU, added up over the processes."""
    there = numbers.to(_device(), copy=True)
    dist.all_reduce(there)
    return there.cpu()


def _device() -> torch.device:
    """Where tensors have to lie to be sent."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
