"""Supervised fine-tuning of a causal language model: TRL does the data work and the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import TaskType
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from loralloc.allocation import replicas
from loralloc.allocation.supervised import SupervisedLoss, supervised_positions
from loralloc.runs.arguments import RunArguments
from loralloc.runs.data import ROW
from loralloc.runs.heads.head import Head, Rows
from loralloc.runs.prepared_rows import once
from loralloc.tasks.classification import LABEL_COLUMN
from loralloc.tasks.columns import conversation_column, to_sft
from loralloc.tasks.conversations import template_options
from loralloc.tasks.source import Split
from loralloc.tasks.task import Task
from loralloc.training.batches import LengthBuckets
from loralloc.training.checkpoint import SafeCheckpoints
from loralloc.training.loss import PLAIN_LOSSES, loss_of_step
from loralloc.training.way_of_running import is_compiled

MOST_LOGITS = 2**27
"""Logits held at once, half a gigabyte in float32, of a head that is not computed in chunks."""

OWN_PART: dict[str, Callable[[int], int]] = {
    "mean_token_accuracy": lambda processes: processes,
    "num_tokens": lambda processes: 1,
}
"""Metrics that each process has of its own batches, and what their sum is divided by."""

TEMPLATES = (".jinja", ".j2")
"""Endings of files that hold a chat template."""


class SupervisedSFTTrainer(LengthBuckets, SafeCheckpoints, SFTTrainer):
    """TRL's trainer with checkpoints that hold no pickles and a head that works where loss is.

    TRL's fused head bounds memory by computing its chunks twice, in float32; on a CPU that is half
    of a small model's step. It is still the way of batches whose logits could not be held.
    """

    _counts_its_part = False
    """Whether metrics are of this process's batches alone; TRL's own way gathers them."""

    @functools.cached_property
    def _supervised_loss(self) -> SupervisedLoss:
        return SupervisedLoss(self.accelerator.unwrap_model(self.model))

    @functools.cached_property
    def _is_compiled(self) -> bool:
        return is_compiled(self)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = functools.partial(super()._prepare_dataset, dataset, *args, **kwargs)
        return once(dataset, prepare)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy at supervised positions; TRL's own way for all that is not plain."""
        if return_outputs or self._has_a_loss_of_its_own():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        positions = supervised_positions(inputs["labels"])
        if not self._fits(positions, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        loss = self._supervised_loss(inputs, positions=positions, through=model)
        self._counts_its_part = True
        if mode == "train":
            mask = inputs.get("attention_mask")  # None where sequences are packed into one row
            self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        metrics = self._metrics[mode]
        metrics["mean_token_accuracy"].append(loss.correct / max(1, loss.num_targets))
        metrics["num_tokens"] = [self._total_train_tokens]
        return loss_of_step(self, loss, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, for which the metrics leave the device, where they wait until here."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in metrics.items():
            values[:] = [v.item() if isinstance(v, Tensor) else v for v in values]
            if name in OWN_PART and values and self._counts_its_part:
                mean = sum(values) / len(values)
                values[:] = [replicas.total(mean) / OWN_PART[name](replicas.count())]
        super().log(logs, start_time)

    def _has_a_loss_of_its_own(self) -> bool:
        return (
            self.args.loss_type not in PLAIN_LOSSES
            or self.compute_loss_func is not None
            or self.label_smoother is not None
            or self.aux_loss_enabled  # of a mixture's router
            or self._is_compiled
        )

    def _fits(self, positions: Tensor, inputs: Any) -> bool:
        """Whether the logits can be held: with several processes, one answer for all of them.

        TRL's own way gathers its metrics, for which every process waits.
        """
        num_logits = len(positions) * self.model.config.vocab_size
        if self.accelerator.num_processes == 1 and num_logits <= MOST_LOGITS:
            return True
        return self._supervised_loss.is_bounded(inputs)


def sft_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    splits: Mapping[str, Split],
) -> SupervisedSFTTrainer:
    """A trainer for train and validation splits in TRL's columns.

    Raises:
        ValueError: An option has no effect on such rows, a chat template refuses one, or one is
            left without a supervised token by truncation.
    """
    check_options(splits, tokenizer, args)
    args.dataset_text_field = "text"  # the data is read under this name, whatever its own was
    if args.label_smoothing_factor and args.loss_type == "chunked_nll":
        args.loss_type = "nll"  # the other has no logits that could be smoothed
    with refused_rows_named(splits, tokenizer):
        trainer = SupervisedSFTTrainer(
            model=model,
            args=args,
            train_dataset=splits["train"].dataset,
            eval_dataset=splits["validation"].dataset,
            processing_class=tokenizer,
        )
    for name, prepared in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        _refuse_unsupervised(splits[name], prepared, args)
    return trainer


def _refuse_unsupervised(split: Split, prepared: Dataset, args: SFTConfig) -> None:
    """TRL drops examples without a supervised token; say which, and stop."""
    if ROW not in split.dataset.column_names or ROW not in prepared.column_names:
        return  # a mixture, or packed: rows are cut and joined, none is dropped
    left = set(prepared[ROW])
    dropped = [(row, index) for index, row in enumerate(split.dataset[ROW]) if row not in left]
    if dropped:
        row, index = min(dropped)
        start = str(split.dataset[index])[:60]
        raise ValueError(
            f"{len(dropped)} of {len(split.dataset)} examples of {split.source} have no supervised "
            f"token left within `max_length` of {args.max_length}, the first in row {row} "
            f"({start}...); raise `max_length`, shorten the prompts or leave these rows out."
        )


def _check(model: str, task: Task | None, is_encoder: bool) -> None:
    if is_encoder:
        raise ValueError(
            f"{model} is an encoder and cannot generate; use `--head classification`, `--head "
            "span` or a causal language model."
        )


def _rows(splits: Mapping[str, Split], task: Task | None, options: RunArguments) -> Rows:
    """Rows of `to_sft`; labels beside texts were there to be learnt, and it would drop them.

    Raises:
        ValueError: There are some, and no head was asked for.
    """
    rows = to_sft(splits, task)
    given = splits.get("train")
    if given is None or task is not None or options.head != "auto":
        return rows, ()
    is_text = "text" in rows["train"].dataset.column_names
    if is_text and LABEL_COLUMN in given.dataset.column_names:
        raise ValueError(
            f"{given.source} has the column {LABEL_COLUMN} beside its texts, which a language "
            "model would not learn; use `--head classification`, or `--head lm` for texts alone."
        )
    return rows, ()


def check_options(
    splits: Mapping[str, Split], tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> None:
    """Refuse options that rows of this form do not read, and conversations without a template.

    Raises:
        ValueError: Naming the option.
    """
    train = splits["train"]
    is_chat = conversation_column(train.dataset) is not None
    path = args.chat_template_path
    if path is not None and not (path.endswith(TEMPLATES) and Path(path).is_file()):
        raise ValueError(
            f"`chat_template_path` is {path!r}, and must be a file with a template "
            f"({' or '.join(TEMPLATES)}): that of another tokenizer would come with new tokens, "
            "whose embeddings no adapter holds."
        )
    if path is not None and not is_chat:
        raise ValueError(
            f"`chat_template_path` is for conversations, and {train.source} holds texts; leave it "
            "out."
        )
    if is_chat and path is None and not tokenizer.chat_template:
        raise ValueError(
            f"{train.source} holds conversations, and the model's tokenizer has no chat template; "
            "give one with `--chat_template_path FILE.jinja`."
        )
    if args.completion_only_loss and "completion" not in train.dataset.column_names:
        other = "; for messages there is `assistant_only_loss`" if is_chat else ""
        raise ValueError(
            f"`completion_only_loss` is true, and {train.source} has no completions{other}; leave "
            "it out."
        )


@contextmanager
def refused_rows_named(
    splits: Mapping[str, Split], tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Name the row that the chat template raised at while rows were tokenised.

    Raises:
        ValueError: With the row and the template's words.
    """
    try:
        yield
    except Exception:  # a template may raise anything, and whatever is not its fault goes on
        for split in splits.values():
            _refuse_untemplated(split, tokenizer)
        raise


def _refuse_untemplated(split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    column = conversation_column(split.dataset)
    if column is None:
        return
    for row in sorted(split.dataset, key=lambda row: row[ROW]):
        completion = row.get("completion", []) if column == "prompt" else []
        try:
            _render(tokenizer, row, row[column], add_generation_prompt=column == "prompt")
            _render(tokenizer, row, row[column] + completion)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"Row {row[ROW]} of {split.source}: the model's chat template does not take the "
                f"conversation: {reason.rstrip('.')}."
            ) from error


def _render(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], messages: Any, **options: Any
) -> None:
    tokenizer.apply_chat_template(messages, tokenize=False, **template_options(row), **options)


LM = Head(
    name="lm",
    task_type=TaskType.CAUSAL_LM,
    auto_class="AutoModelForCausalLM",
    measures={"loss": False, "mean_token_accuracy": True},
    suits=lambda task, is_encoder: not is_encoder,
    check=_check,
    rows=_rows,
    trainer=lambda model, tokenizer, splits, settings: sft_trainer(
        model, tokenizer, settings.training, splits
    ),
    generates=True,
)
"""A language model, which learns to go on from a prompt."""
