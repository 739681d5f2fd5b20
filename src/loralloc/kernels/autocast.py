"""What `torch.autocast` asks of a kernel: the dtype of its products, and that alone.

A kernel takes its inputs to that dtype itself and computes outside of autocast, in its forward and
in its backward: autocast would round what a kernel keeps in float32, and a backward pass that is
called within it would be rounded although its forward was not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would multiply x in; None where it leaves x as it is."""
    is_cast = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast and _is_on(x) else None


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast does nothing on x's device."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x) else nullcontext()


def _is_on(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
