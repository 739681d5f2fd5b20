"""Which numbers an option may be.

Libraries tell of some others late, in words of their own (a batch of no examples, a seed below 0),
and take the rest without a word: a learning rate of 0, which trains nothing, or a negative decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between two ends."""

    least: float
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in it, which one that is none (NaN) does not."""
        above = self.least < value if self.without_least else self.least <= value
        below = value < self.most if self.without_most else value <= self.most
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        """In words, behind "it must be"."""
        words = f"above {self.least:g}" if self.without_least else f"at least {self.least:g}"
        if self.most == math.inf:
            return words
        most = f"{self.most:,.0f}" if self.most > 1 else f"{self.most:g}"
        return f"{words} and {'below' if self.without_most else 'at most'} {most}"


POSITIVE = Range(least=0, without_least=True)
NOT_NEGATIVE = Range(least=0)
COUNT = Range(least=1)
SHARE = Range(least=0, most=1, without_most=True)
SEED = Range(least=0, most=2**32 - 1)

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "lora_alpha"), POSITIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_epsilon", "eval_delay", "neftune_noise_alpha"), NOT_NEGATIVE),
    "dataloader_num_workers": NOT_NEGATIVE,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "max_length"), COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "dataset_num_proc"), COUNT),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
}
"""By the option's name."""

NO_MAX_STEPS = -1
"""`max_steps` of a run whose length its epochs say."""


def check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse a number that an option cannot be.

    Args:
        given: Options with their values.

    Raises:
        ValueError: Naming the option and the numbers that it may be.
    """
    for name, allowed in RANGES.items():
        value = given.get(name)
        if isinstance(value, int | float) and not allowed.holds(value):
            raise ValueError(f"`{name}` is {value:g}; it must be {allowed}.")
    steps = given.get("max_steps", NO_MAX_STEPS)
    if steps != NO_MAX_STEPS and not COUNT.holds(steps):
        raise ValueError(
            f"`max_steps` is {steps}; it must be {COUNT}, or {NO_MAX_STEPS} for a run as long as "
            "its epochs."
        )
