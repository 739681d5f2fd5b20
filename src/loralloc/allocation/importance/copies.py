"""Copies of a micro-batch in one forward pass, each for another ablation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loralloc.allocation.objective import Batch

MOST_TOKENS = {"cpu": 256}
MOST_TOKENS_ELSEWHERE = 4096


def num_copies(batch: Batch, seen: torch.Size | None, *, device: str, num_blocks: int) -> int:
    num_examples = count_examples(batch)
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    is_repeatable = all(len(tensor) in (1, num_examples) for tensor in tensors)
    has_rows_of_examples = seen is not None and len(seen) == 3 and seen[0] == num_examples
    if not is_repeatable or not has_rows_of_examples:
        return 1
    most = MOST_TOKENS.get(device, MOST_TOKENS_ELSEWHERE)
    return max(1, min(most // (seen[0] * seen[1]), num_blocks))


def count_examples(batch: Batch) -> int:
    return len(batch["labels"] if "labels" in batch else batch["start_positions"])


def repeated(value: Any, num_examples: int, times: int) -> Any:
    if times == 1:
        return value
    if isinstance(value, tuple):
        return tuple(repeated(part, num_examples, times) for part in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == num_examples:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value
