"""A whole run: from settings to a folder that stock PEFT opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import get_quantization_config

from loralloc.allocation.layers import base_model
from loralloc.allocation.record import FILE_NAME as RECORD_NAME
from loralloc.allocation.record import Round
from loralloc.kernels.attention import use_short_attention
from loralloc.kernels.lora import fuse
from loralloc.methods.in_place import CONFIG_NAME
from loralloc.methods.method import Method
from loralloc.tasks.catalog import get_task
from loralloc.tasks.classification import to_classification
from loralloc.tasks.columns import to_sft
from loralloc.tasks.source import Split
from loralloc.tasks.task import Task
from loralloc.training import card, data, protocol
from loralloc.training import settings as settings_module
from loralloc.training.adaptation import check_quantised, fit, method_of
from loralloc.training.attach import AllocationCallback, attach
from loralloc.training.checkpoint import last_checkpoint, step_of
from loralloc.training.classification import classification_trainer
from loralloc.training.drive import STATE_NAME, drive
from loralloc.training.heads import choose_head
from loralloc.training.models import Head, is_encoder, load_model, load_tokenizer
from loralloc.training.settings import Settings
from loralloc.training.sft import sft_trainer
from loralloc.training.spans import span_rows, span_trainer
from loralloc.training.trained import LABELS_NAME, save_labels

METRICS_NAME = "metrics.jsonl"

TASK_TYPES: dict[Head, TaskType] = {
    "lm": TaskType.CAUSAL_LM,
    "classification": TaskType.SEQ_CLS,
    "span": TaskType.QUESTION_ANS,
}
"""PEFT's names of what the heads are used for."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that training needs, checked and ready."""

    settings: Settings
    method: Method
    model: Any
    """The adapted model."""

    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    allocation: AllocationCallback | None
    """The rounds, where the method has any."""

    splits: dict[str, Split]
    """The rows as loaded."""

    task: Task | None
    head: Head


def prepare(settings: Settings, *, on_round: Callable[[Round], None] | None = None) -> Run:
    """Load data and model, build the trainer and attach the allocation.

    What can be refused is refused here, before anything is written.

    Raises:
        ValueError: Settings, data and model do not fit together; one sentence.
        TypeError: The adapter or the way of running has no rank allocation.
    """
    folder = settings.output_dir
    existed = folder.exists()
    try:
        return _prepare(settings, on_round)
    finally:
        # Trainer makes its output folder when it is built.
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _prepare(settings: Settings, on_round: Callable[[Round], None] | None) -> Run:
    if settings.sources.get("use_peft") != "loralloc default" and not settings.model.use_peft:
        raise ValueError("`use_peft` is false; choose with `--method` how the model is adapted.")
    method = method_of(settings)
    task = get_task(settings.run.task) if settings.run.task else None
    splits = data.load(settings, task)
    name, model_options = settings.model.model_name_or_path, _model_options(settings)
    revision = {k: model_options[k] for k in ("revision", "trust_remote_code")}
    encoder = is_encoder(name, **revision)
    head = choose_head(settings.run, task, model=name, is_encoder=encoder)
    tokenizer = load_tokenizer(name, **revision)
    set_seed(settings.training.seed)  # before the adapter's weights are drawn
    if head == "classification":
        labelled, labels = to_classification(
            data.used(splits),
            task,
            text_column=settings.run.text_column,
            text_pair_column=settings.run.text_pair_column,
            label_column=settings.run.label_column,
        )
        ready = data.with_validation(labelled, settings)
        settings = protocol.apply(settings, num_examples=len(ready["train"].dataset))
        names = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
        model = _adapted(settings, method, head, {**model_options, **names})
        trainer: Trainer = classification_trainer(
            model, tokenizer, settings.training, ready, max_length=settings.training.max_length
        )
    elif head == "span":
        assert task is not None, "choose_head wants a task for spans"
        rows = data.numbered(span_rows(data.used(splits), task))
        ready = data.with_validation(rows, settings)
        settings = protocol.apply(settings, num_examples=len(ready["train"].dataset))
        model = _adapted(settings, method, head, model_options)
        trainer = span_trainer(
            model,
            tokenizer,
            settings.training,
            ready,
            max_length=settings.training.max_length,
            stride=settings.run.stride,
        )
    else:
        ready = data.with_validation(data.numbered(to_sft(data.used(splits), task)), settings)
        settings = protocol.apply(settings, num_examples=len(ready["train"].dataset))
        model = _adapted(settings, method, head, model_options)
        trainer = sft_trainer(model, tokenizer, settings.training, ready)
    settings = protocol.follow(trainer, settings)
    drive(trainer, method)
    config = method.allocation(settings.allocation)
    return Run(
        settings=settings,
        method=method,
        model=model,
        tokenizer=tokenizer,
        trainer=trainer,
        allocation=attach(trainer, config, on_round=on_round) if config else None,
        splits=splits,
        task=task,
        head=head,
    )


def train(run: Run, *, checkpoint: Path | None = None) -> None:
    """Train, and write the run folder.

    Args:
        run: What `prepare` gave.
        checkpoint: Where to go on from, as `last_checkpoint` gives it.
    """
    folder = run.settings.output_dir
    if checkpoint:
        run.method.check_saved(checkpoint)
        _forget_metrics(folder / METRICS_NAME, after=step_of(checkpoint))
    run.settings.save()
    run.trainer.add_callback(MetricsWriter(folder / METRICS_NAME))
    run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.method.save(folder)
    run.tokenizer.save_pretrained(folder)
    labels = run.model.config.id2label if run.head == "classification" else {}
    if labels:
        save_labels(folder, labels)
    card.write(
        folder,
        base_model=str(run.settings.model.model_name_or_path),
        data=_data_name(run.settings),
        head=run.head,
        num_labels=len(labels),
        method=run.method,
        record=run.allocation.record if run.allocation else None,
        log=run.trainer.state.log_history,
    )


def _forget_metrics(path: Path, *, after: int) -> None:
    """Drop the entries of steps that a resumed run takes again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= after]
        path.write_text("".join(kept), encoding="utf-8")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    names = (settings_module.FILE_NAME, RECORD_NAME, CONFIG_NAME, "adapter_config.json")
    return any((folder / name).exists() for name in names)


def clear(folder: Path) -> None:
    """Remove what a run writes from its folder, and what was found out about it; nothing else."""
    for path in (*folder.glob("checkpoint-*"), *folder.glob("eval")):
        shutil.rmtree(path)
    written = (
        settings_module.FILE_NAME,
        RECORD_NAME,
        METRICS_NAME,
        LABELS_NAME,
        CONFIG_NAME,
        f"{STATE_NAME}.json",
        f"{STATE_NAME}.safetensors",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "answers.jsonl",
    )
    for name in written:
        (folder / name).unlink(missing_ok=True)


def checkpoint_to_resume(folder: Path) -> Path:
    """The checkpoint that `--resume` goes on from.

    Raises:
        ValueError: The run was ended before its first checkpoint.
    """
    found = last_checkpoint(folder)
    if found is None:
        raise ValueError(
            f"The run in {folder} has no checkpoint yet, so there is nothing to resume; start "
            "again with `--overwrite`."
        )
    return found


class MetricsWriter(TrainerCallback):
    """Every log entry of a run as a line of JSON."""

    def __init__(self, path: Path) -> None:
        """Write to `path`, after what is there."""
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one entry."""
        line = json.dumps({"step": state.global_step, **(logs or {})}, default=float)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _adapted(settings: Settings, method: Method, head: Head, options: dict[str, Any]) -> Any:
    """The backbone with its head, adapted. An encoder's head is drawn at random and trains too."""
    if head != "lm":
        # The head trains in float32, and so does the small backbone below it.
        options["dtype"] = options["dtype"] or torch.float32
    model, loading = load_model(
        settings.model.model_name_or_path, head=head, output_loading_info=True, **options
    )
    check_quantised(method, model)
    fresh: list[str] = []
    if head != "lm":
        fresh = sorted({key.rpartition(".")[0] for key in loading["missing_keys"]})
    fit(method, model, settings.run.budget)
    heads = [*fresh, *(settings.model.lora_modules_to_save or ())]
    model = method.prepare(model, task_type=TASK_TYPES[head], heads=heads)
    fuse(model)
    use_short_attention(base_model(model))
    return model


def _model_options(settings: Settings) -> dict[str, Any]:
    model = settings.model
    dtype = getattr(torch, model.dtype, None) if isinstance(model.dtype, str) else None
    if model.dtype not in (None, "auto") and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"`dtype` is {model.dtype!r}; use 'float32', 'bfloat16', 'float16' or 'auto'."
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": model.model_revision,
        "trust_remote_code": settings.training.trust_remote_code,
    }
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    quantization = get_quantization_config(model)
    if quantization is not None:
        options["quantization_config"] = quantization
    return options


def _data_name(settings: Settings) -> str:
    return str(settings.script.dataset_name or settings.run.task or "a mixture of data sets")
