"""Supervised fine-tuning of a causal language model: TRL does the data work and the loss."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from loralloc.tasks.columns import to_sft
from loralloc.tasks.source import Split
from loralloc.tasks.task import Task
from loralloc.training.checkpoint import SafeCheckpoints

ROW = "source_row"
"""Column that remembers each example's row while TRL prepares the data."""


class SafeSFTTrainer(SafeCheckpoints, SFTTrainer):
    """TRL's trainer, with checkpoints that hold no pickles."""


def sft_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    splits: dict[str, Split],
    task: Task | None,
) -> SafeSFTTrainer:
    """A trainer for prompt and completion, messages, Alpaca's columns or plain text.

    Raises:
        ValueError: Columns are missing, a row breaks its contract, or an example is left without
            a supervised token by truncation.
    """
    data = to_sft({name: splits[name] for name in ("train", "validation")}, task)
    numbered = {
        name: split.dataset.add_column(ROW, list(range(1, len(split.dataset) + 1)))
        for name, split in data.items()
    }
    trainer = SafeSFTTrainer(
        model=model,
        args=args,
        train_dataset=numbered["train"],
        eval_dataset=numbered["validation"],
        processing_class=tokenizer,
    )
    for name, prepared in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        _refuse_unsupervised(data[name], prepared, args)
    return trainer


def _refuse_unsupervised(split: Split, prepared: Dataset, args: SFTConfig) -> None:
    """TRL drops examples without a supervised token; say which, and stop."""
    if ROW not in prepared.column_names:
        return  # packed: rows are cut and joined, none is dropped
    left = set(prepared[ROW])
    dropped = [row for row in range(1, len(split.dataset) + 1) if row not in left]
    if dropped:
        start = str(split.dataset[dropped[0] - 1])[:60]
        raise ValueError(
            f"{len(dropped)} of {len(split.dataset)} examples of {split.source} have no supervised "
            f"token left within `max_length` of {args.max_length}, the first in row {dropped[0]} "
            f"({start}...); raise `max_length`, shorten the prompts or leave these rows out."
        )
