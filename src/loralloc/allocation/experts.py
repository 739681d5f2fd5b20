"""Experts that are one parameter: how PEFT lays out their ranks, and what one rank of them is.

Since Transformers 5 a mixture's experts are one parameter of three dimensions, which PEFT adapts by
`target_parameters`. It keeps one A of shape (E r, in_features) and one B of shape (out_features,
E r) for all E experts, which it reads as (E, r, in_features) and (out_features, r, E), so that
every expert has the same r. A rank is then one rank of each expert: E rows of A and E columns of B.

Of an ordinary module E is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from loralloc.allocation.transfers import followed_by


def num_experts(layer: LoraLayer) -> int:
    """How many rows of A, and columns of B, one rank of a layer has (E)."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1


def ranked(weight: Tensor, experts: int, *, dim: int) -> tuple[Tensor, int]:
    """A weight, or what is kept of each of its elements, with one index for each rank.

    Args:
        weight: A, or B, as PEFT keeps it.
        experts: E.
        dim: The dimension in which the ranks are, 0 of A and 1 of B.

    Returns:
        The same memory with a dimension of length r, and which that is: of A (E, r, in_features)
        and of B (out_features, r, E), where E is not 1.
    """
    if experts == 1:
        return weight, dim
    shape = list(weight.shape)
    apart = (experts, shape[dim] // experts)
    shape[dim : dim + 1] = apart if dim == 0 else apart[::-1]
    return weight.view(shape), 1


def ranks_followed_by(
    kept: Sequence[int], old: Tensor, new: Tensor, experts: int, *, dim: int
) -> Tensor:
    """The ranks of `old` at some indices, then those of `new`; of each expert's, its own.

    Args:
        kept: Indices of ranks.
        old: A, or B, as PEFT keeps it, or what is kept of each of its elements.
        new: Likewise.
        experts: E.
        dim: The dimension in which the ranks are, 0 of A and 1 of B.
    """
    (whole, at), (behind, _) = (ranked(part, experts, dim=dim) for part in (old, new))
    values = followed_by(kept, whole, behind, dim=at)
    return values if experts == 1 else values.flatten(dim, dim + 1)


def over_ranks(values: Tensor, experts: int) -> Tensor:
    """The sum over each rank's columns of B, shape (num_ranks,), of one value a column."""
    return values if experts == 1 else values.view(-1, experts).sum(dim=1)


def rank_norms(a: Tensor, b: Tensor, experts: int) -> Tensor:
    """The norm of B_i A_i of every rank, over all experts, shape (num_ranks,)."""
    rows, columns = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0)
    if experts == 1:
        return cast(Tensor, rows * columns)
    # Rows come expert by expert, columns rank by rank.
    each = rows.view(experts, -1).T * columns.view(-1, experts)
    return cast(Tensor, torch.linalg.vector_norm(each, dim=1))


def parameter_name(name: str, layer: ParamWrapper) -> str:
    """The full name of the parameter that a wrapper adapts, by which PEFT's patterns find it.

    Args:
        name: Of the wrapper, below the base model. Wrappers of two parameters of one module lie
            within one another.
        layer: The wrapper.
    """
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"


def path_of(base: nn.Module, layer: nn.Module) -> str:
    """Where a layer is in the base model."""
    paths: dict[int, str] = {id(module): path for path, module in base.named_modules()}
    return paths[id(layer)]


def put_in_place(base: nn.Module, path: str, module: nn.Module) -> None:
    """Let a module be what lies at a path of the base model."""
    parent, _, child = path.rpartition(".")
    setattr(base.get_submodule(parent), child, module)
