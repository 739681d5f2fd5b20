"""Tensors of many modules between the processor and a GPU, in one transfer instead of many.

A processor waits for its GPU at every transfer, some hundred times a round if each module had its
own. And no indices are sent where slices will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, by one transfer for each device and dtype that they have."""
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        groups[tensor.device, tensor.dtype].append(name)
    found = {}
    for names in groups.values():
        whole = torch.cat([tensors[name].flatten() for name in names]).cpu()
        parts = torch.split(whole, [tensors[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            found[name] = part.view(tensors[name].shape)
    return {name: found[name] for name in tensors}


def from_cpu(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the CPU on other tensors' devices and in their dtypes, likewise.

    Args:
        tensors: By name, all of one dtype.
        like: Of each name, what tells its device and dtype.
    """
    groups = defaultdict(list)
    for name in tensors:
        groups[like[name].device, like[name].dtype].append(name)
    found = {}
    for (device, dtype), names in groups.items():
        whole = torch.cat([tensors[name].flatten() for name in names]).to(dtype).to(device)
        parts = torch.split(whole, [tensors[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            found[name] = part.view(tensors[name].shape)
    return found


def followed_by(kept: Sequence[int], old: Tensor, new: Tensor, *, dim: int) -> Tensor:
    """The slices of `old` at some indices along `dim`, then `new`: one operation, no index."""
    return torch.cat([*slices(kept, old, dim=dim), new], dim=dim)


def slices(kept: Sequence[int], old: Tensor, *, dim: int) -> list[Tensor]:
    """Views of `old` that have the slices at some indices along `dim`, in their order."""
    return [old.narrow(dim, first, length) for first, length in _runs(kept)]


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Beginning and length of each run of indices that follow each other."""
    begin = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield indices[begin], end - begin
            begin = end
