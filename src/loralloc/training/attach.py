"""Rank allocation inside any `transformers.Trainer`, from one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from peft import AdaLoraConfig
from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import active_adapter, adapted_part
from loralloc.allocation.record import Round
from loralloc.methods.alora import Alora
from loralloc.methods.shrink import Shrink
from loralloc.training.drive import drive

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    config: AllocationConfig | None = None,
    *,
    scoring_dataset: Any = None,
    on_round: Callable[[Round], None] | None = None,
    adapter_name: str | None = None,
) -> Alora:
    """Let a trainer's LoRA ranks move between modules while it trains.

    This is `drive` with ALoRA on a model that has its adapter already, or with Shrink where the
    options have `preset="shrink"`. Everything that can be refused is refused here, before the first
    step. Training that ends, or an adapter that is saved, without any round having taken place
    raises an error.

    Args:
        trainer: A `transformers.Trainer` or a subclass such as TRL's `SFTTrainer`, with a PEFT
            model that has a plain LoRA adapter.
        config: The options; the paper's by default.
        scoring_dataset: Held-out examples as the trainer evaluates on; its `eval_dataset` by
            default. None for a score that is gathered while training.
        on_round: Called with each round once it has taken place.
        adapter_name: PEFT's name of the adapter; the active one by default.

    Returns:
        The allocation: its `record` holds the rounds, its `steps` say when they are.

    Raises:
        ValueError: The options do not fit the model, the data or the length of the run.
        TypeError: The adapter or the way of running has no rank allocation.

    Example:
        >>> trainer = SFTTrainer(model, ..., peft_config=LoraConfig(r=8))  # doctest: +SKIP
        >>> attach(trainer, AllocationConfig(num_rounds=8))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"The first argument is a {type(trainer).__name__}; give a transformers.Trainer, whose "
            "model has the adapter. For a loop of your own there is `follow`."
        )
    config = AllocationConfig() if config is None else config
    if not isinstance(config, AllocationConfig):
        raise TypeError(
            f"The options are {config!r:.60}; give an AllocationConfig, as in attach(trainer, "
            "AllocationConfig(num_rounds=4))."
        )
    model = adapted_part(trainer.model)
    name = active_adapter(model) if adapter_name is None else adapter_name
    if isinstance(getattr(model, "peft_config", {}).get(name), AdaLoraConfig):
        raise TypeError(
            "The adapter is PEFT's AdaLoRA, which has an allocation of its own; begin with a "
            "LoraConfig, or give the bare model to drive(trainer, get_method('adalora')(rank=8))."
        )
    kind = Shrink if config.preset == "shrink" else Alora
    method = kind.on(model, config, adapter_name=name)
    drive(trainer, method, scoring_dataset=scoring_dataset, on_round=on_round)
    if method.record.note and replicas.is_first():
        logger.warning("loralloc: %s.", method.record.note)
    return method
