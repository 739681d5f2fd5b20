"""Which run reads which option: one table, by which what would have no effect is refused.

What a method reads of LoRA's options follows from its fields (`adaptation.LORA_FLAGS`), and options
of the allocation are read where ranks are allocated; all the others stand here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from loralloc.runs.arguments import GROUPS
from loralloc.runs.protocol import SOURCE as PROTOCOL

if TYPE_CHECKING:
    from loralloc.runs.heads.head import Head
    from loralloc.runs.settings import Settings

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""The option that says whether activations are computed again: newer versions of Transformers have
another name for it, and set it where the old one is given."""

Condition = tuple[str, tuple[Any, ...]]
"""Another option, and the values with which one is read; any value but false or none if empty."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Who reads an option."""

    heads: tuple[str, ...] = ("lm", "classification", "span")
    """The heads whose runs read it."""

    where: tuple[Condition, ...] = ()
    """Conditions of which one has to hold for it to be read."""

    unless: str = ""
    """Another option, with which it is not read."""

    follows: Callable[[Head], str] | None = None
    """What the head decides it to be."""

    never: str = ""
    """Why no run reads it."""

    inert: str = ""
    """Why it is taken although no run reads it."""


def where(*conditions: Condition, **options: Any) -> Reading:
    """Read where one of the conditions holds."""
    return Reading(where=conditions, **options)


EVERY = Reading()
NEWER = Reading(never="this version of loralloc does not know it")
"""Of an option that TRL or Transformers have got since."""
LM = Reading(heads=("lm",))
CLASSIFICATION = Reading(heads=("classification",), unless="task")
NO_MIXTURE = Reading(unless="datasets")
EVALUATED = where(("eval_strategy", ("steps", "epoch")))
SAVED = where(("save_strategy", ("steps", "epoch", "best")))
CHOSEN = where(
    ("load_best_model_at_end", ()),
    ("save_strategy", ("best",)),
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
)
"""Where a run looks for its best evaluation."""

PUSHED = where(("push_to_hub", ()))
REPORTED = where(("report_to", ()))
QUANTISED = where(("load_in_4bit", ()))
WORKED = where(("dataloader_num_workers", ()))

OPTIMIZERS = [name.value for name in OptimizerNames]
MOMENTS = [
    name
    for name in OPTIMIZERS
    if not any(other in name for other in ("sgd", "adagrad", "rmsprop", "adafactor", "lomo"))
]
"""Optimisers that are Adam's relatives."""

BETAS = where(("optim", tuple(MOMENTS)))
EPSILON = where(("optim", tuple(name for name in MOMENTS if "lion" not in name)))
LAYERWISE = where(("optim", tuple(n for n in OPTIMIZERS if n.startswith(("galore", "apollo")))))
SCHEDULES = [name.value for name in SchedulerType]


def _scheduled(*without: str) -> Reading:
    """Read by every schedule of the learning rate but some."""
    return where(("lr_scheduler_type", tuple(n for n in SCHEDULES if n not in without)))


STREAM = Reading(never="rounds and epochs need the number of rows, which a stream does not have")
PREDICTIONS = Reading(never="a run is evaluated by its loss, and a classifier by its accuracy")

READ_BY: Mapping[str, Reading] = {
    # ScriptArguments: where the rows come from
    **dict.fromkeys(("dataset_name", "dataset_config"), NO_MIXTURE),
    **dict.fromkeys(("dataset_train_split", "dataset_test_split"), EVERY),
    "dataset_streaming": STREAM,
    "ignore_bias_buffers": Reading(never="no model here has buffers that it concerns"),
    # DatasetMixtureConfig
    "datasets": EVERY,
    "streaming": STREAM,
    "test_split_size": where(("datasets", ())),
    # RunArguments
    **dict.fromkeys(
        (
            *("task", "method", "budget", "paper", "head", "validation_examples", "protocol"),
            *("early_stopping_patience", "cuda_graphs"),
        ),
        EVERY,
    ),
    **dict.fromkeys(("text_column", "text_pair_column", "label_column"), CLASSIFICATION),
    "stride": Reading(heads=("span",)),
    # ModelConfig: the backbone, and LoRA's options
    **dict.fromkeys(
        (
            *("model_name_or_path", "model_revision", "dtype", "attn_implementation"),
            *("load_in_8bit", "load_in_4bit", "use_peft", "lora_r", "lora_alpha", "lora_dropout"),
            *("lora_target_modules", "lora_target_parameters"),
            *("lora_modules_to_save", "use_rslora", "use_dora"),
        ),
        EVERY,
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), QUANTISED
    ),
    "lora_task_type": Reading(follows=lambda head: head.task_type.value),
    # SFTConfig beyond TrainingArguments
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "max_length", "pad_token"), EVERY),
    **dict.fromkeys(
        (
            *("router_aux_loss_coef", "chat_template_path", "dataset_num_proc", "eos_token"),
            *("shuffle_dataset", "packing", "padding_free", "pad_to_multiple_of", "eval_packing"),
            *("completion_only_loss", "assistant_only_loss", "loss_type", "activation_offloading"),
        ),
        LM,
    ),
    "dataset_text_field": Reading(heads=("lm", "classification"), unless="task"),
    "dataset_kwargs": Reading(never="rows are always tokenised here"),
    "truncation_mode": where(("max_length", ()), heads=("lm",)),
    "packing_strategy": where(("packing", ()), ("eval_packing", ()), heads=("lm",)),
    # TrainingArguments: the optimiser and its schedule
    **dict.fromkeys(
        (
            *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps"),
            *("learning_rate", "lr_scheduler_type", "optim", "optim_args"),
            *("weight_decay", "gradient_accumulation_steps", "max_grad_norm"),
            *("neftune_noise_alpha", "auto_find_batch_size"),
        ),
        EVERY,
    ),
    "lr_scheduler_kwargs": _scheduled("constant", "constant_with_warmup"),
    "warmup_steps": _scheduled("constant", "reduce_lr_on_plateau", "greedy"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), BETAS),
    "adam_epsilon": EPSILON,
    "optim_target_modules": LAYERWISE,
    "label_smoothing_factor": Reading(heads=("lm", "classification")),
    # its arithmetic and memory
    **dict.fromkeys(
        (
            *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "use_cache"),
            *("gradient_checkpointing", CHECKPOINTING, "torch_empty_cache_steps"),
            *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        ),
        EVERY,
    ),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", f"{CHECKPOINTING}_kwargs"),
        where((CHECKPOINTING, ())),
    ),
    "use_liger_kernel": Reading(heads=("lm", "classification")),
    "liger_kernel_config": where(("use_liger_kernel", ())),
    # its log
    **dict.fromkeys(
        (
            *("logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level"),
            *("log_on_each_node", "log_level_replica", "include_num_input_tokens_seen", "debug"),
            *("report_to", "skip_memory_metrics"),
        ),
        EVERY,
    ),
    "logging_steps": where(("logging_strategy", ("steps",)), ("eval_strategy", ("steps",))),
    "disable_tqdm": Reading(inert="the bars of the command are its own"),
    **dict.fromkeys(
        (
            *("run_name", "project", "trackio_space_id", "trackio_bucket_id"),
            "trackio_static_space_id",
        ),
        REPORTED,
    ),
    # its evaluations
    **dict.fromkeys(
        ("eval_strategy", "eval_on_start", "per_device_eval_batch_size", "prediction_loss_only"),
        EVERY,
    ),
    "eval_steps": where(("eval_strategy", ("steps",))),
    "eval_delay": EVALUATED,
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_use_gather_object"),
        Reading(heads=("classification",)),
    ),
    **dict.fromkeys(
        ("eval_do_concat_batches", "batch_eval_metrics", "include_for_metrics"), PREDICTIONS
    ),
    # its checkpoints
    **dict.fromkeys(("save_strategy", "enable_jit_checkpoint", "load_best_model_at_end"), EVERY),
    **dict.fromkeys(("save_total_limit", "save_only_model", "save_on_each_node"), SAVED),
    "save_steps": where(("save_strategy", ("steps",))),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), CHOSEN),
    "push_to_hub": EVERY,
    **dict.fromkeys(
        (
            *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            "hub_revision",
        ),
        PUSHED,
    ),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), EVERY),
    "resume_from_checkpoint": Reading(never="a run goes on from its last checkpoint by `--resume`"),
    # its data
    **dict.fromkeys(
        (
            *("full_determinism", "seed", "data_seed", "dataloader_drop_last"),
            *("dataloader_num_workers", "dataloader_pin_memory", "remove_unused_columns"),
            "train_sampling_strategy",
        ),
        EVERY,
    ),
    **dict.fromkeys(
        (
            *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
            *("dataloader_multiprocessing_context", "dataloader_in_order"),
        ),
        WORKED,
    ),
    "length_column_name": Reading(never="lengths are counted in tokens"),
    "label_names": Reading(never="each head names its labels itself"),
    # several processes
    **dict.fromkeys(
        (
            *("accelerator_config", "parallelism_config", "average_tokens_across_devices"),
            *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
            *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "deepspeed"),
        ),
        EVERY,
    ),
    "fsdp_config": where(("fsdp", ())),
    "local_rank": Reading(inert="launchers of several processes give it"),
    # scripts of Transformers
    "do_train": Reading(inert="it is what the command does"),
    "do_eval": EVALUATED,
    "do_predict": Reading(never="`loralloc eval` predicts"),
}
"""Every option by name."""

UNCHANGED = {
    field.name: field.default
    if field.default is not dataclasses.MISSING
    else field.default_factory()
    if field.default_factory is not dataclasses.MISSING
    else None
    for group in GROUPS
    for field in dataclasses.fields(group)
}
"""What an option is where nobody gives it, in TRL and Transformers: so much changes nothing."""


def acts(settings: Settings, name: str) -> bool:
    """Whether a run reads an option, with the others as they are."""
    reading = READ_BY.get(name)
    if reading is None:
        return True
    where = reading.where
    return not reading.inert and (not where or any(_holds(settings, *one) for one in where))


def check_options(settings: Settings) -> None:
    """Refuse what no run reads, or none that is given its data in this way.

    Raises:
        ValueError: Naming the option, and why it has no effect.
    """
    for name in _given(settings):
        reading = READ_BY.get(name, NEWER)
        if reading.never:
            raise ValueError(f"`{name}` has no effect here: {reading.never}; leave it out.")
        if reading.unless and _value(settings, reading.unless):
            raise ValueError(
                f"`{name}` is not read where `{reading.unless}` is given; leave one of the two out."
            )


def check_head_options(settings: Settings, head: Head) -> None:
    """Refuse what this head does not read.

    Raises:
        ValueError: Naming the option and the heads that read it.
    """
    for name in _given(settings):
        readers = READ_BY[name].heads
        if head.name not in readers:
            raise ValueError(
                f"`{name}` is read by the {' or the '.join(readers)} head, and this run has the "
                f"{head.name} head; leave it out or use `--head {readers[0]}`."
            )
    for name, reading in READ_BY.items():
        value = settings.given.get(name)
        if reading.follows and value is not None and value != reading.follows(head):
            raise ValueError(
                f"`{name}` is {value!r}, and follows from the {head.name} head: it is "
                f"{reading.follows(head)!r}; leave it out."
            )


def check_conditions(settings: Settings) -> None:
    """Refuse what is read with other options only, once a protocol has given its own.

    Raises:
        ValueError: Naming the option and what it is read with.
    """
    for name in _given(settings):
        if settings.sources[name].startswith(PROTOCOL):
            continue
        conditions = READ_BY[name].where
        if conditions and not any(_holds(settings, *one) for one in conditions):
            raise ValueError(
                f"`{name}` is read only with {_in_words(settings, conditions)}; give that too, or "
                "leave it out."
            )


def _given(settings: Settings) -> list[str]:
    """Options that somebody gave, other than they are anyway."""
    return [
        name
        for name, value in settings.given.items()
        if name in UNCHANGED and settings.gives(name) and value != UNCHANGED[name]
    ]


def _holds(settings: Settings, option: str, values: tuple[Any, ...]) -> bool:
    value = _value(settings, option)
    return value in values if values else bool(value)


def _value(settings: Settings, option: str) -> Any:
    """What an option is once all are resolved."""
    groups = (settings.script, settings.training, settings.model, settings.mixture, settings.run)
    return next(getattr(group, option) for group in groups if hasattr(group, option))


def _in_words(settings: Settings, conditions: tuple[Condition, ...]) -> str:
    """Such as "`eval_strategy` 'steps' (it is 'epoch')"."""
    words = []
    for option, values in conditions:
        if not values:
            words.append(f"`{option}`")
            continue
        shown = ", ".join(map(repr, values[:3])) + (" and others" if len(values) > 3 else "")
        now = _value(settings, option)
        words.append(f"`{option}` {shown} (it is {getattr(now, 'value', now)!r})")
    return " or ".join(words)
