"""A and B as products take them: scaled, cast, padded and transposed, for a whole model at once.

Weights are a few megabytes in some hundred tensors, and a GPU is told of each operation on each of
them. So all that a pass over the model will read is made when its first layer is called, by a few
operations over lists of tensors: rows of A and columns of B of one length lie in one matrix, and a
layer reads its part.

A pass is over when a layer is called out of the order of the pass before. What was made then is
made anew, but for two cases in which no optimiser steps: activation checkpointing calls layers
again in the backward pass, and of gradients that accumulate Accelerate tells. In both, weights that
were replaced or changed are noticed by their memory, their versions and the steps of optimisers.
Versions alone prove nothing: PyTorch's fused AdamW moves none, nor does what writes to `.data`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loralloc.kernels.covered import adapter_of

MULTIPLE = 8
"""Ranks of a product of half precision: oneDNN takes no longer for them than for fewer, and tensor
cores want them."""


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """The rank that a product of this dtype is made with."""
    return -(-rank // MULTIPLE) * MULTIPLE if dtype.itemsize == 2 else rank


class Adapter(NamedTuple):
    """The weights of one layer."""

    a: Tensor
    """Shape (num_ranks, in_features)."""

    b: Tensor
    """Shape (out_features, num_ranks)."""

    scaling: float

    @classmethod
    def of(cls, layer: LoraLayer) -> Adapter:
        """Those of the active adapter, its gates and singular values among them."""
        return cls(*adapter_of(layer))

    @property
    def is_kept(self) -> bool:
        """Whether the weights are the layer's own, with versions, and not made for one call."""
        return _is_own(self.a) and _is_own(self.b)


def _is_own(weight: Tensor) -> bool:
    # By its type first: `isinstance` asks a Parameter's metaclass, which takes ten times as long.
    is_parameter = type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
    return is_parameter and not weight.is_inference()


class Packed:
    """The weights of layers that read one input, in the dtype of its products.

    Args:
        adapters: Of each layer.
        sa: s_i A_i one below the other, shape (R, in_features).
        bt: B_i^T, each of shape (R_i, out_features), where the R_i add up to R.
        kept: Whether the weights are the layers' own.
    """

    def __init__(
        self, adapters: Sequence[Adapter], sa: Tensor, bt: Sequence[Tensor], *, kept: bool
    ) -> None:
        self.sa, self.bt = sa, bt
        self.a, self.b, scalings = zip(*adapters, strict=True)
        self.heights = [bt_i.shape[0] for bt_i in bt]
        """The R_i, which may be padded."""
        self.ranks = [a.shape[0] for a in self.a]
        self.scalings = list(scalings)
        self.scaling = scalings[0] if len(set(scalings)) == 1 else None
        """The one that all layers have, if they do."""
        self._state = _state(adapters) if kept else None
        # An alias keeps the memory, so that no other weight can come to lie at its address.
        self._aliases = [w.detach() for w in (*self.a, *self.b)] if kept else []

    def is_of(self, adapters: Sequence[Adapter]) -> bool:
        """Whether these are the weights it was made of, as far as can be told."""
        return self._state is not None and self._state == _state(adapters)


def _state(adapters: Sequence[Adapter]) -> list[Any]:
    state: list[Any] = []
    for a, b, scaling in adapters:
        state += (scaling, id(a), a.data_ptr(), a._version, id(b), b.data_ptr(), b._version)
    return state


Key = tuple[tuple[LoraLayer, ...], torch.dtype]


class Packs:
    """What the layers of a model read in a pass over it.

    It belongs to passes, not to the model: a copy of a model begins with none.
    """

    def __init__(self) -> None:
        self._packs: dict[Key, Packed] = {}
        self._order: dict[Key, float] = {}  # of the pass before, and what came in this one beside
        self._read: list[Key] = []  # in this pass
        self._place: float = -1  # of the last that was read
        self._lasts = False
        self.is_apart = False
        """Whether layers read weights of their own: what is recorded makes them in every replay."""
        forget = functools.partial(_forget, weakref.ref(self))
        weakref.finalize(self, register_optimizer_step_post_hook(forget).remove)

    def __reduce__(self) -> Any:
        """Nothing of it is copied or saved."""
        return Packs, ()

    def get(self, layers: Sequence[LoraLayer], dtype: torch.dtype) -> Packed:
        """The weights of layers that read one input, in the dtype of its products."""
        adapters = [Adapter.of(layer) for layer in layers]
        key = (tuple(layers), dtype)
        packed = self._packs.get(key)
        fits = packed is not None and packed.is_of(adapters)
        if self.is_apart or not (fits or all(adapter.is_kept for adapter in adapters)):
            return _pack([(adapters, dtype)], kept=False)[0]
        if not _in_backward():
            if self._order.get(key, math.inf) <= self._place:
                self._begin(anew=not (self._lasts and fits))
                packed = self._packs.get(key)
                fits = packed is not None and packed.is_of(adapters)
            # One that the pass before has not read, as another expert, comes in between.
            self._place = self._order.setdefault(key, self._place)
            self._read.append(key)
        if packed is None or not fits:
            (packed,) = _pack([(adapters, dtype)])
            self._packs[key] = packed
        return packed

    def _begin(self, *, anew: bool) -> None:
        """A pass begins, which will read what the one before has read."""
        wanted = {key: (own, key[1]) for key in self._read if (own := _own(key[0]))}
        if anew:
            self._packs = {}  # gives the memory back first
            self._packs = dict(zip(wanted, _pack(list(wanted.values())), strict=True))
        self._order = {key: place for place, key in enumerate(wanted)}
        self._read, self._place = [], -1
        self._lasts = not GradientState().sync_gradients  # no optimiser steps after this pass

    def forget(self) -> None:
        """The weights have changed: whatever is read next begins a pass."""
        self._packs, self._place = {}, math.inf


def _forget(packs: weakref.ref[Packs], *_: Any) -> None:
    """What an optimiser calls after a step."""
    if (those := packs()) is not None:
        those.forget()


def _own(layers: Sequence[LoraLayer]) -> list[Adapter] | None:
    """The weights of layers that were called once; None where a pass may not read them now."""
    for layer in layers:
        active = layer.active_adapters
        if len(active) != 1 or active[0] not in layer.lora_A:
            return None
    adapters = [Adapter.of(layer) for layer in layers]
    return adapters if all(adapter.is_kept for adapter in adapters) else None


def _in_backward() -> bool:
    """Whether a backward pass calls, which computes activations again."""
    return bool(torch._C._current_graph_task_id() != -1)


@torch.inference_mode(False)
@torch.no_grad()
def _pack(
    wanted: Sequence[tuple[Sequence[Adapter], torch.dtype]], *, kept: bool = True
) -> list[Packed]:
    """The weights of several groups of layers, by a few operations for all."""
    stack = _Stack()
    adapters = [adapter for group, _ in wanted for adapter in group]
    scaled = iter(_scaled(adapters))
    places = [
        (
            [stack.add(next(scaled), dtype) for _ in group],
            [stack.add(adapter.b.detach().t(), dtype) for adapter in group],
        )
        for group, dtype in wanted
    ]
    stack.close()
    return [
        # Rows of A came one after the other, so that they are one part.
        Packed(
            group,
            stack.part(a[0][0], a[0][1], a[-1][2]),
            [stack.part(*place) for place in b],
            kept=kept,
        )
        for (group, _), (a, b) in zip(wanted, places, strict=True)
    ]


def _scaled(adapters: Iterable[Adapter]) -> list[Tensor]:
    """s_i A_i of each: scaling the weights spares scaling activations."""
    by_kind = defaultdict(list)
    for number, adapter in enumerate(adapters):
        by_kind[adapter.a.device, adapter.a.dtype].append((number, adapter))
    found: dict[int, Tensor] = {}
    for some in by_kind.values():
        values = [adapter.a.detach() for _, adapter in some]
        scaled = torch._foreach_mul(values, [adapter.scaling for _, adapter in some])
        found.update(zip((number for number, _ in some), scaled, strict=True))
    return [found[number] for number in range(len(found))]


class _Stack:
    """Rows of many matrices, those of one length in one matrix and each padded to a whole rank."""

    def __init__(self) -> None:
        self._parts: dict[Any, list[tuple[Tensor, int]]] = defaultdict(list)
        self._heights: dict[Any, int] = defaultdict(int)
        self._whole: dict[Any, Tensor] = {}

    def add(self, rows: Tensor, dtype: torch.dtype) -> tuple[Any, int, int]:
        """Put rows, shape (num_ranks, width), below the others; where they lie."""
        num_rows, width = rows.shape
        kind = (width, rows.dtype, rows.device, dtype)
        begin, height = self._heights[kind], padded_rank(num_rows, dtype)
        self._parts[kind].append((rows, height - num_rows))
        self._heights[kind] = begin + height
        return kind, begin, begin + height

    def close(self) -> None:
        """Make the matrices."""
        zeros: dict[Any, Tensor] = {}
        widest = max((kind[0] for kind in self._parts), default=0)
        for kind, parts in self._parts.items():
            width, own, device, dtype = kind
            together = []
            for rows, missing in parts:
                together.append(rows)
                if missing:
                    if (own, device) not in zeros:
                        zeros[own, device] = rows.new_zeros(MULTIPLE, widest)
                    together.append(zeros[own, device][:missing, :width])
            self._whole[kind] = torch.cat(together).to(dtype)

    def part(self, kind: Any, begin: int, end: int) -> Tensor:
        """The rows from one place to another, contiguous."""
        return self._whole[kind][begin:end]
