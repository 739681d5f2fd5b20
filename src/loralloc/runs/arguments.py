"""Every option of a run: TRL's, ours, those of the allocation, and where our defaults differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

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
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record the blocks of the model once for each length of batch and replay them: "
            "for small models and short batches on one GPU."
        },
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
    "learning_rate": 2e-4,
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
without a GPU. The learning rate is not the paper's, at which a short run learns little."""

HELP = {
    "output_dir": "The run folder; runs/DATA-MODEL by default.",
    "model_name_or_path": "smollm2-135m, minilm-l6, a folder, or a name on the Hub.",
    "dtype": "Type of the frozen weights: 'float32', 'bfloat16', 'float16' or 'auto'; by default "
    "what this machine computes fastest.",
    "lora_r": "Rank of every module at the start.",
    "lora_alpha": "LoRA's scaling is lora_alpha / lora_r, and stays what it is where ranks move.",
    "use_peft": "Always: a run trains an adapter; `--method full` trains all weights.",
    "learning_rate": "Highest learning rate. The default is what LLaMA of 7B and 13B was trained "
    "with by LoRA (Dettmers et al. 2023, QLoRA); `--protocol paper` has 1e-4, and `--protocol "
    "tuned` what the method's authors use (`loralloc methods`).",
    "warmup_steps": "Steps in which the learning rate rises from 0; below 1, a share of the run.",
    "train_sampling_strategy": "Order of the examples: 'random', 'sequential', 'group_by_length' "
    "or 'batch_rebalance'.",
    "gradient_checkpointing": "Compute activations twice, for less memory.",
    "bf16": "Compute in bfloat16 where weights are float32 (mixed precision).",
    "lora_target_modules": "Modules to adapt, by the ends of their names with blanks between; by "
    "default every linear layer of a block.",
    "lora_target_parameters": "Parameters to adapt beside them, by the ends of their names: a "
    "mixture's experts (mlp.experts.gate_up_proj mlp.experts.down_proj). For lora and the methods "
    "that allocate.",
}
"""What an option is, where TRL's and Transformers' words are those of other defaults."""

GROUPS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, RunArguments)
