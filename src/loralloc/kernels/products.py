"""Products with a frozen weight: by the faster of two libraries, in autocast's dtype.

PyTorch multiplies float32 with Intel's MKL, which runs AMD's processors at half their speed.
oneDNN, which PyTorch uses for bfloat16, runs both at full speed.

Under `torch.autocast` a kernel takes its inputs to autocast's dtype itself and computes outside of
it, in its forward and in its backward: autocast would round what a kernel keeps in float32, and a
backward pass that is called within it would be rounded although its forward was not.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CPUINFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + bias, without a graph.

    Args:
        x: Shape (tokens, in_features).
        weight: Shape (out_features, in_features); may be the transpose of another.
        bias: Shape (out_features,).

    Returns:
        Shape (tokens, out_features).
    """
    if not _by_onednn(x):
        return functional.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return product


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add X W^T to a total in place, within the product where that is the same; see `linear`."""
    if x.dtype == total.dtype and not _by_onednn(x):
        return total.addmm_(x, weight.t())
    return total.add_(linear(x, weight))


def _by_onednn(x: Tensor) -> bool:
    is_float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_float32 and bool(x.numel()) and mkl_is_slow()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL here.

    Told by the maker of the processor, not by a stopwatch, so that two runs round alike.
    """
    backends: Any = torch.backends
    return (
        backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and backends.mkl.is_available()
        and CPUINFO.is_file()
        and "AuthenticAMD" in CPUINFO.read_text(errors="replace")
    )


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
