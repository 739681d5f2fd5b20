"""How far vectors are from orthonormal, which AdaLoRA and SaLoRA add to the loss."""

from __future__ import annotations

import torch
from torch import Tensor


def off_orthonormal(rows: Tensor) -> Tensor:
    """||R R^T - I||_F, a scalar, of R with shape (num_rows, width)."""
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    distance: Tensor = torch.linalg.matrix_norm(rows @ rows.T - identity)
    return distance
