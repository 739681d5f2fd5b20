"""A CUDA graph for any device: operations noted once, and done again on the same memory."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape:
    """A recording; see `loralloc.kernels.graphs.Recording`.

    Every tensor keeps the memory that it had, so that whatever is made of numbers of the moment
    instead of memory is the same in every replay, as it would be on a GPU.
    """

    def __init__(self):
        self._operations = []

    def record(self, work):
        with _Noting(self._operations):
            return work()

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, output in self._operations:
                again = function(*args, **kwargs)
                pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(again), strict=True)
                for old, new in pairs:
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, operations):
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Aliases, since a shape may be changed in place later on.
        given = pytree.tree_map(_alias, (args, kwargs or {}))
        output = function(*args, **(kwargs or {}))
        self._operations.append((function, *given, pytree.tree_map(_alias, output)))
        return output


def _alias(leaf):
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
