"""Classification of a text or a pair of texts: a linear head on the pooled representation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from loralloc.runs.heads.head import Head
from loralloc.runs.models import longest_input
from loralloc.runs.prepared_rows import once
from loralloc.tasks.classification import to_classification
from loralloc.tasks.source import Split
from loralloc.training.batches import LengthBuckets
from loralloc.training.checkpoint import SafeCheckpoints


class SafeTrainer(LengthBuckets, SafeCheckpoints, Trainer):
    """The trainer of Transformers, with checkpoints that hold no pickles."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the mean of each batch: what the model computes, whatever it is told of the step."""
        super().__init__(*args, **kwargs)
        # Else a step's gradients grow with the batches it accumulates and with the processes.
        self.model_accepts_loss_kwargs = False


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

    def prepared(rows: Dataset) -> Dataset:
        return once(
            rows, lambda: rows.map(tokenize, batched=True, remove_columns=rows.column_names)
        )

    data = {name: prepared(splits[name].dataset) for name in ("train", "validation")}
    return encoder_trainer(model, tokenizer, args, data, compute_metrics=accuracy)


def encoder_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    data: Mapping[str, Dataset],
    **options: Any,
) -> SafeTrainer:
    """A trainer for tokenised train and validation rows, padded batch by batch.

    Raises:
        ValueError: There is no token to pad with.
    """
    use_padding(model, tokenizer, getattr(args, "pad_token", None))
    return SafeTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        **options,
    )


def use_padding(model: Any, tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> None:
    """Let a classifier and its tokenizer agree on a padding token, chosen as TRL chooses it.

    Args:
        model: The model, adapted or not.
        tokenizer: Its tokenizer.
        wanted: The token asked for; otherwise the tokenizer's own, or else its end token.

    Raises:
        ValueError: There is no such token.
    """
    token = wanted or tokenizer.pad_token or tokenizer.eos_token
    if token is None or token not in tokenizer.get_vocab():
        given = (
            "The tokenizer has no padding token" if token is None else f"`pad_token` is {token!r}"
        )
        raise ValueError(
            f"{given}, and batches need one of its vocabulary; name it with `--pad_token`."
        )
    tokenizer.pad_token = token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


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


CLASSIFICATION = Head(
    name="classification",
    task_type=TaskType.SEQ_CLS,
    auto_class="AutoModelForSequenceClassification",
    measures={"loss": False, "accuracy": True},
    suits=lambda task, is_encoder: is_encoder and (task is None or bool(task.labels)),
    check=lambda model, task, is_encoder: None,
    rows=lambda splits, task, options: to_classification(
        splits,
        task,
        text_column=options.text_column,
        text_pair_column=options.text_pair_column,
        label_column=options.label_column,
    ),
    trainer=lambda model, tokenizer, splits, settings: classification_trainer(
        model, tokenizer, settings.training, splits, max_length=settings.training.max_length
    ),
    dtype=torch.float32,  # the head trains in it, and so does the small backbone below it
    is_new=True,
    has_labels=True,
)
"""A classifier of a text or of a pair: one linear layer."""
