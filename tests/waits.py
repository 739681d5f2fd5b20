"""What makes a processor wait for its GPU, counted where there is none."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,  # item(), bool(), int() and float() of a tensor
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Waits(TorchDispatchMode):
    """The operations whose result the processor has to know before it can go on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXING and any(
            t.dtype == torch.bool for t in args[1] if t is not None
        )
        if function in WAITING or by_mask:
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


def waits_of(function, *args, **kwargs):
    """The waiting operations of one call."""
    with Waits() as waits:
        function(*args, **kwargs)
    return waits.seen
