"""Classification of a text or a pair of texts: a linear head on the pooled representation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from loralloc.runs.models import longest_input
from loralloc.tasks.source import Split
from loralloc.training.bucketing import LengthBuckets
from loralloc.training.checkpoint import SafeCheckpoints


class SafeTrainer(LengthBuckets, SafeCheckpoints, Trainer):
    """The trainer of Transformers, with checkpoints that hold no pickles."""


def classification_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    splits: Mapping[str, Split],
    *,
    max_length: int | None,
) -> SafeTrainer:
    """A trainer for splits with the columns `text`, `label` and perhaps `text_pair`."""
    max_length = longest_input(model, tokenizer, max_length)

    def tokenize(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        encoded = encode(tokenizer, rows["text"], rows.get("text_pair"), max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    data = {
        name: splits[name].dataset.map(
            tokenize, batched=True, remove_columns=splits[name].dataset.column_names
        )
        for name in ("train", "validation")
    }
    return encoder_trainer(model, tokenizer, args, data, compute_metrics=accuracy)


def encoder_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    data: Mapping[str, Dataset],
    **options: Any,
) -> SafeTrainer:
    """A trainer for tokenised train and validation rows, padded batch by batch."""
    return SafeTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        **options,
    )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str | list[str],
    text_pair: str | list[str] | None,
    *,
    max_length: int,
) -> BatchEncoding:
    """What the model reads of one example or of several; of a pair the longer text is cut first."""
    return tokenizer(text, text_pair, truncation="longest_first", max_length=max_length)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose highest logit is their label's."""
    chosen = np.argmax(np.asarray(prediction.predictions), axis=-1)
    return {"accuracy": float((chosen == prediction.label_ids).mean())}
