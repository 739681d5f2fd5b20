"""Classification with an encoder: one linear head on the pooled representation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from loralloc.tasks.source import Split
from loralloc.training.checkpoint import SafeCheckpoints


class SafeTrainer(SafeCheckpoints, Trainer):
    """The trainer of Transformers, with checkpoints that hold no pickles."""


def classification_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    splits: Mapping[str, Split],
    *,
    max_length: int | None,
) -> SafeTrainer:
    """A trainer for splits with the columns `text` and `label`."""

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], truncation=max_length is not None, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    data = {
        name: splits[name].dataset.map(tokenize, batched=True, remove_columns=["text", "label"])
        for name in ("train", "validation")
    }
    return SafeTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose highest logit is their label's."""
    chosen = np.argmax(np.asarray(prediction.predictions), axis=-1)
    return {"accuracy": float((chosen == prediction.label_ids).mean())}
