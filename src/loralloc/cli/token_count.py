"""How many tokens a trainer has trained on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class TokenCount:
    """The tokens of a trainer's training batches, without padding, from now on."""

    def __init__(self, trainer: Any) -> None:
        """Look at every batch that the trainer draws for a step."""
        self._drawn: list[int | Tensor] = []
        own = trainer.get_batch_samples

        @functools.wraps(own)
        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, num_items = own(*args, **kwargs)
            self._drawn += map(_tokens, batches)
            return batches, num_items

        trainer.get_batch_samples = get_batch_samples

    def total(self) -> int:
        """Tokens so far. It waits for a GPU, so it is asked for now and then only."""
        found = sum(map(int, self._drawn))
        self._drawn = [found]
        return found


def _tokens(batch: Any) -> int | Tensor:
    """Tokens of a batch; 0 where it does not have any."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return 0
    mask = batch.get("attention_mask")
    return mask.sum() if isinstance(mask, Tensor) else batch["input_ids"].numel()
