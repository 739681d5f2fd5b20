"""The best approximation of a product by so many ranks, from the whole matrix."""

import numpy as np


def truncated(product: np.ndarray, rank: int) -> np.ndarray:
    """U S V^T of the largest singular values (Eckart & Young 1936)."""
    u, s, vt = np.linalg.svd(product)
    total = np.zeros_like(product)
    for i in range(rank):
        total += s[i] * np.outer(u[:, i], vt[i])
    return total


def singular_values(product: np.ndarray) -> list[float]:
    return np.linalg.svd(product, compute_uv=False).tolist()
