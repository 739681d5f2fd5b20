"""Every option of a run: TRL's, ours, those of the allocation, and where our defaults differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from loralloc.allocation.config import AllocationConfig

BLOCK = "allocation"
OPTIONS = "method"
"""What a method's own options begin with: `method.bottleneck`."""


@dataclass
class RunArguments:
    """What a run needs beyond TRL's own arguments."""

    task: str | None = field(
        default=None,
        metadata={"help": "Task that turns rows into prompts and labels; see `loralloc.tasks`."},
    )
    method: str = field(
        default="alora",
        metadata={"help": "How the model is adapted; `loralloc methods` lists all."},
    )
    budget: int | None = field(
        default=None,
        metadata={
            "help": "Parameters that the method may add, which choose its size; by default those "
            "of LoRA with rank 8."
        },
    )
    paper: bool = field(
        default=False, metadata={"help": "The size that the method has in the paper's comparison."}
    )
    head: Literal["auto", "lm", "classification", "span"] = field(
        default="auto",
        metadata={"help": "Head of the model; auto: by the model and the task."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text to classify, without a task."}
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column with the second text of a pair, without a task."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the label, without a task."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that neighbouring windows of a long context share, with a span head; "
            "a quarter of `max_length` by default."
        },
    )
    validation_examples: int = field(
        default=100,
        metadata={"help": "Training examples held out where the data has no validation split."},
    )
    protocol: Literal["paper", "tuned"] | None = field(
        default=None,
        metadata={
            "help": "paper: train, evaluate and stop as in its Appendix E; tuned: the same with "
            "the learning rate that the method recommends; see the guide."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better one after which training stops."},
    )


DEFAULTS: dict[str, Any] = {
    "output_dir": None,
    "method": "alora",
    "model_name_or_path": "smollm2-135m",
    "dtype": None,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_peft": True,
    "learning_rate": 1e-4,
    "warmup_steps": 0.06,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": False,
    "bf16": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is no number is shown as one that is none
    "report_to": "none",
}
"""Where loralloc's defaults differ from TRL's: the paper's training (Appendix E), and a machine
without a GPU."""

GROUPS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, RunArguments)


def known_fields() -> dict[str, list[tuple[str, Any]]]:
    """Every flag of `train` with its default, by the class it belongs to."""
    groups = {}
    for group in (*GROUPS, AllocationConfig):
        prefix = f"{BLOCK}." if group is AllocationConfig else ""
        groups[group.__name__] = [
            (prefix + f.name, None if f.default is dataclasses.MISSING else f.default)
            for f in fields(group)
            if f.init
        ]
    return groups
