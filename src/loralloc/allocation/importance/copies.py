"""Several ablations in one forward pass, each in a copy of the micro-batch of its own.

The copies lie one after the other along the batch. Only the layers that an ablation is about tell
them apart: to what such a layer puts out for the copy of rank r is added what the change of column
r of B, from B_r to B_r + dB_r, makes of it,

    dy = s (x A_r^T) dB_r^T        dB_r = -B_r switches the rank off
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loralloc.allocation.objective import Batch, count_examples

MOST_TOKENS = {"cpu": 1024}
"""Tokens that the copies of a forward pass add up to at most, by kind of device. On a CPU copies
share the reading of the weights: of smollm2-135m in float32, four copies of 76 tokens took 1.5
times less than one by one and eight 1.6 times, four of 312 tokens 1.2 times and eight 1.3 times."""

MOST_TOKENS_ELSEWHERE = 4096
"""Chosen, not measured: enough rows for a GPU's large products, where few leave it waiting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """A change of one column of a module's B, as what it adds to the output: (x a) b^T."""

    name: str
    """The module."""

    index: int
    """The column, which is to say the rank."""

    layer: LoraLayer
    """The module itself."""

    adapter: str
    """PEFT's name of the adapter that the rank is of."""

    a: Tensor
    """The rank's row of A times the scaling, shape (in_features,)."""

    b: Tensor
    """What is added to the column of B, shape (out_features,)."""

    @property
    def is_on(self) -> bool:
        """Whether the module adds the adapter now; a loss may switch it off for some passes."""
        return not self.layer.disable_adapters and self.adapter in self.layer.active_adapters


def changes_of(
    layer: LoraLayer, name: str, b: Tensor, added: Tensor, indices: Sequence[int]
) -> list[Change]:
    """The changes of single columns of a module's B.

    Args:
        layer: The module.
        name: Its name.
        b: B_m, shape (out_features, num_ranks), which tells the adapter.
        added: What is added to each column, of the same shape.
        indices: The columns that are to change, each by itself.
    """
    (adapter,) = (key for key, lora_b in layer.lora_B.items() if lora_b.weight is b)
    a = layer.lora_A[adapter].weight * layer.scaling[adapter]
    return [
        Change(name=name, index=index, layer=layer, adapter=adapter, a=a[index], b=added[:, index])
        for index in indices
    ]


def num_copies(batch: Batch, shape: torch.Size, *, device: str, num_blocks: int) -> int:
    """How many ablations of a module may share a forward pass: as many as pay, and fit.

    Without a graph a pass holds the activations of one block at a time, while a step of training
    holds those of every block, of a micro-batch no smaller than scoring's. So as many copies as
    there are blocks still hold less than a step, and a round does not raise the peak. Activation
    checkpointing leaves a step little more than one block's: there the number of tokens is what
    bounds the copies.

    Args:
        batch: The micro-batch.
        shape: Shape of the module's input for it.
        device: Kind of device.
        num_blocks: Blocks of the model.

    Returns:
        1 also where the module's input is not (num_examples, length, in_features): experts see
        some of the tokens, in an order of their own, and a packed batch has tokens for examples.
    """
    num_examples = count_examples(batch)
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    is_by_example = all(len(tensor) in (1, num_examples) for tensor in tensors)
    if not is_by_example or len(shape) != 3 or shape[0] != num_examples:
        return 1
    most = MOST_TOKENS.get(device, MOST_TOKENS_ELSEWHERE)
    return max(1, min(most // (shape[0] * shape[1]), num_blocks))


def repeated(value: Any, num_examples: int, times: int) -> Any:
    """Copies, one after the other, of whatever has a row an example; all else as it is."""
    if times == 1:
        return value
    if isinstance(value, Mapping):
        return {key: repeated(part, num_examples, times) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(repeated(part, num_examples, times) for part in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == num_examples:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


@contextmanager
def one_a_copy(changes: Sequence[Change]) -> Iterator[None]:
    """Each change in effect in the copy of its number, and in no other.

    A hook on the layer itself sees what the fused step put out for it, alone or with its siblings.
    """

    def adding(copy: int, change: Change) -> Any:
        def add(_: LoraLayer, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not change.is_on:
                return
            size = len(output) // len(changes)
            rows = slice(copy * size, (copy + 1) * size)
            h = args[0][rows].to(change.a.dtype) @ change.a  # (num_examples, length)
            output[rows] += h[..., None] * change.b

        return add

    handles = [
        change.layer.register_forward_hook(adding(copy, change))
        for copy, change in enumerate(changes)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def input_shapes(layers: Mapping[str, LoraLayer]) -> Iterator[dict[str, torch.Size]]:
    """Note the shape of what each layer reads."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Any:
        return lambda _layer, args: shapes.update({name: args[0].shape})

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
