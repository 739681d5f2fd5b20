"""The product with a frozen weight, by the faster of the two libraries that PyTorch carries.

PyTorch multiplies float32 with Intel's MKL, which runs AMD's processors at half their speed.
oneDNN, which PyTorch uses for bfloat16, runs both at full speed.
"""

from __future__ import annotations

import functools
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
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() or not mkl_is_slow():
        return functional.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return product


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
