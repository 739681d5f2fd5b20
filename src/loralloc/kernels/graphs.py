"""A model's blocks as CUDA graphs: their kernels launched as one, with no Python in between.

A small model, or a short batch, keeps a GPU waiting: PyTorch takes longer to tell it of a kernel
than the kernel takes. A CUDA graph is told once and replayed. Here all blocks of a backbone are one
graph forward and one backward for each shape of batch, recorded when a shape comes for the second
time. What lies outside of the blocks (embeddings, head, loss, optimiser) runs as ever.

A graph reads and writes the memory that it was recorded with. So inputs are copied into it, A and B
are cast and padded inside of it, and gradients are copied out. Weights that were replaced, as a
round does, or an adapter that was switched off, end all graphs; a second forward pass before the
backward pass of the first runs as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from loralloc.kernels.packed import Packs

MOST_SHAPES = 32
"""Shapes of batches that are recorded: each holds its activations' memory. Others run as ever."""

WARM_UPS = 2
"""Passes before a recording, in which libraries choose their kernels and take their memory."""


PLAIN = (Tensor, bool, int, float, str, type(None))
"""Kinds of arguments of a block that a recording can be made for."""


class Recording(Protocol):
    """Work on a device that is done again by `replay`."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Note what is launched; what it returned lies where every replay will write it."""

    def replay(self) -> None:
        """Do it."""


class CudaGraph:
    """See `Recording`.

    Args:
        pool: The memory of the recordings that are replayed in the order in which they were made.
    """

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def record(self, work: Callable[[], Any]) -> Any:
        """See `Recording`; on a stream that is not the device's first."""
        self._graph.capture_begin(pool=self._pool)
        try:
            return work()
        finally:
            self._graph.capture_end()

    def replay(self) -> None:
        """See `Recording`."""
        self._graph.replay()


def cuda_graphs() -> Callable[[], Recording]:
    """What makes the recordings of one shape."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


class GraphedBlocks:
    """Takes the place of the forward of a backbone's blocks.

    Args:
        blocks: In order, each reading what the one before puts out.
        recordings: What makes the recordings of a shape.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        recordings: Callable[[], Callable[[], Recording]] = cuda_graphs,
    ) -> None:
        self._recordings = recordings
        modules = [module for block in blocks for module in block.modules()]
        self._layers = [module for module in modules if isinstance(module, LoraLayer)]
        self._packs: set[Packs] = {vars(m)["packs"] for m in modules if "packs" in vars(m)}
        self._blocks = list(blocks)
        self._own = [block.forward for block in blocks]
        for number, block in enumerate(blocks):
            vars(block)["forward"] = _Forward(self, number)
        self._is_on = False
        self._state: list[Any] = []
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self._pass: _Pass | None = None

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        for block in self._blocks:
            del vars(block)["forward"]
        self._recorded = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Forward passes inside may be replayed."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on, self._pass = False, None

    def forward(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a block."""
        if not (self._is_on and torch.is_grad_enabled()):
            return self._own[number](*args, **kwargs)
        if number == 0:
            self._pass = self._begin(args, kwargs)
            if self._pass.recorded:
                return self._pass.recorded(args, kwargs)
        if self._pass is None:
            return self._own[number](*args, **kwargs)
        if self._pass.recorded:
            return args[0]  # the first block has run all
        self._pass.check(args, kwargs)
        return self._own[number](*args, **kwargs)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Pass:
        """A forward pass begins."""
        state = self._state_of_weights()
        if state is None:
            return _Pass(None, None)
        if state != self._state:
            self._state, self._recorded, self._seen = state, {}, set()
        if not args:
            raise ValueError(
                "CUDA graphs are made of blocks whose first argument is what they read, and this "
                "model calls them by names only; leave `cuda_graphs` out."
            )
        leaves, tree = _flat(args, kwargs)
        if not all(isinstance(leaf, PLAIN) for leaf in leaves):
            return _Pass(None, None)  # a cache of keys and values, say, which is longer every time
        key = (*map(_described, leaves), str(tree), *_autocast(args[0]))
        recorded = self._recorded.get(key)
        if recorded is None and key in self._seen and len(self._recorded) < MOST_SHAPES:
            recorded = self._recorded[key] = self._record(args, kwargs)
        self._seen.add(key)
        if recorded is not None and recorded.is_busy:
            recorded = None
        return _Pass(recorded, leaves)

    def _state_of_weights(self) -> list[Any] | None:
        """What a recording holds good for: where the adapters' weights are, and which are used.

        None where something acts on the ranks from outside: gates are other tensors in every step.
        """
        state: list[Any] = []
        for layer in self._layers:
            parts = layer._modules
            state += (layer._disable_adapters, *layer.active_adapters, *layer.merged_adapters)
            for name in ("lora_A", "lora_B"):
                for module in parts[name]._modules.values():
                    if module._forward_hooks:
                        return None
                    weight = module._parameters["weight"]
                    state += (id(weight), weight.data_ptr())
        return state

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recorded:
        """Record the blocks for inputs of these shapes."""
        weights = [p for block in self._blocks for p in block.parameters() if p.requires_grad]
        for packs in self._packs:
            packs.is_apart = True
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._is_on = False
        try:
            return _Recorded(self._own, weights, args, kwargs, self._recordings())
        finally:
            self._is_on = True
            torch.set_autocast_cache_enabled(cached)
            for packs in self._packs:
                packs.is_apart = False


class _Forward:
    """The forward of one block."""

    def __init__(self, graphs: GraphedBlocks, number: int) -> None:
        self._graphs, self._number = graphs, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs.forward(self._number, args, kwargs)


class _Pass:
    """A forward pass over the blocks.

    Args:
        recorded: What replays it; None where it runs as ever.
        leaves: What the first block was called with, flat; None where it is not to be recorded.
    """

    def __init__(self, recorded: _Recorded | None, leaves: list[Any] | None) -> None:
        self.recorded, self._leaves = recorded, leaves

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse blocks that are not called alike, which could not be one recording."""
        if self._leaves is None:
            return
        leaves, _ = _flat(args, kwargs)
        others = leaves[1:], self._leaves[1:]
        if len(leaves) != len(self._leaves) or any(
            a is not b and (isinstance(a, Tensor) or a != b) for a, b in zip(*others, strict=True)
        ):
            raise ValueError(
                "CUDA graphs are made of blocks that all read the same mask and positions, and "
                "this model's do not (some may attend within a window only); leave `cuda_graphs` "
                "out."
            )


class _Recorded:
    """The blocks, recorded for inputs of one shape."""

    def __init__(
        self,
        blocks: Sequence[Callable[..., Any]],
        weights: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recording: Callable[[], Recording],
    ) -> None:
        leaves, tree = _flat(args, kwargs)
        self._weights = weights
        self._static = [_own_copy(leaf) for leaf in leaves]
        (hidden, *rest), named = pytree.tree_unflatten(self._static, tree)
        inputs = [hidden, *weights] if hidden.requires_grad else weights
        self._has_dx = hidden.requires_grad
        self._flight: weakref.ref[_Flight] | None = None

        def forward() -> Tensor:
            found = hidden
            for block in blocks:
                found = block(found, *rest, **named)
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"CUDA graphs are made of blocks that put out a tensor, and this model's put "
                    f"out a {type(found).__name__}; leave `cuda_graphs` out."
                )
            return found

        def backward() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(self._output, inputs, self._dy, allow_unused=True)

        with _apart(hidden.device):
            for _ in range(WARM_UPS):
                self._output = forward()
                self._dy = torch.zeros_like(self._output)
                backward()
            self._forward, self._backward = recording(), recording()
            self._output = self._forward.record(forward)
            self._gradients = self._backward.record(backward)

    @property
    def is_busy(self) -> bool:
        """Whether a backward pass is still to come, for which memory has to stay as it is."""
        flight = self._flight() if self._flight else None
        return flight is not None and not flight.is_over

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the last block puts out."""
        leaves, _ = _flat(args, kwargs)
        function: Any = _Replayed
        output: Tensor = function.apply(self, leaves, args[0], *self._weights)
        return output

    def replay_forward(self, leaves: Sequence[Any], flight: _Flight) -> Tensor:
        """Shape as the first block's input."""
        with torch.no_grad():
            for static, leaf in zip(self._static, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    static.copy_(leaf)
        self._flight = weakref.ref(flight)
        self._forward.replay()
        return self._output.detach()

    def replay_backward(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient by the first block's input, and those by the weights."""
        self._dy.copy_(dy)
        self._backward.replay()
        # Copied at once, since autograd would copy each of what the next replay overwrites.
        there = [gradient for gradient in self._gradients if gradient is not None]
        copies = iter(torch._foreach_mul(there, 1.0))
        found = [None if gradient is None else next(copies) for gradient in self._gradients]
        return (found[0], found[1:]) if self._has_dx else (None, found)


class _Flight:
    """The time from a forward pass to its backward pass, or to where nothing can ask for one."""

    is_over = False


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, leaves: Sequence[Any], hidden: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.recorded, ctx.flight = recorded, _Flight()
        return recorded.replay_forward(leaves, ctx.flight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = ctx.recorded.replay_backward(dy)
        ctx.flight.is_over = True
        return None, None, dx, *gradients


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """A stream of its own, on which a GPU lets itself be recorded."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """All that a block is called with, and how it lies in the arguments."""
    return pytree.tree_flatten(
        (args, kwargs), is_leaf=lambda found: not isinstance(found, (tuple, list, dict))
    )


def _own_copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _described(leaf: Any) -> Any:
    """What a recording depends on: of a tensor its form, of anything else itself."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad, leaf.stride()
    return repr(leaf)


def _autocast(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
