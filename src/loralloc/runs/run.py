"""A whole run: from settings to a folder that stock PEFT opens."""

from __future__ import annotations

import json
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
from loralloc.allocation.record import Round
from loralloc.kernels.attention import use_short_attention
from loralloc.kernels.lora import fuse
from loralloc.methods.alora import Alora
from loralloc.methods.method import Method
from loralloc.runs import card, data, folder, protocol
from loralloc.runs.adaptation import check_quantised, fit, method_of
from loralloc.runs.heads.choice import choose_head
from loralloc.runs.heads.classification import classification_trainer
from loralloc.runs.heads.lm import sft_trainer
from loralloc.runs.heads.span import span_rows, span_trainer
from loralloc.runs.models import Head, is_encoder, load_model, load_tokenizer
from loralloc.runs.settings import Settings
from loralloc.tasks.catalog import get_task
from loralloc.tasks.classification import to_classification
from loralloc.tasks.columns import to_sft
from loralloc.tasks.source import Split
from loralloc.tasks.task import Task
from loralloc.training.drive import drive

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
    splits: dict[str, Split]
    """The rows as loaded."""

    task: Task | None
    head: Head

    @property
    def allocation(self) -> Alora | None:
        """The method, where it moves ranks: its rounds and their steps."""
        return self.method if isinstance(self.method, Alora) else None


def prepare(settings: Settings, *, on_round: Callable[[Round], None] | None = None) -> Run:
    """Load data and model, build the trainer and attach the allocation.

    What can be refused is refused here, before anything is written.

    Raises:
        ValueError: Settings, data and model do not fit together; one sentence.
        TypeError: The adapter or the way of running has no rank allocation.
    """
    where = settings.output_dir
    existed = where.exists()
    try:
        return _prepare(settings, on_round)
    finally:
        # Trainer makes its output folder when it is built.
        if not existed and where.is_dir() and not any(where.iterdir()):
            where.rmdir()


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
    drive(trainer, method, on_round=on_round)
    return Run(
        settings=settings,
        method=method,
        model=model,
        tokenizer=tokenizer,
        trainer=trainer,
        splits=splits,
        task=task,
        head=head,
    )


def train(run: Run, *, checkpoint: Path | None = None) -> None:
    """Train, and write the run folder.

    Args:
        run: What `prepare` gave.
        checkpoint: Where to go on from, as `folder.last_checkpoint` gives it.
    """
    where = run.settings.output_dir
    if checkpoint:
        run.method.check_saved(checkpoint)
        folder.forget_metrics(where, after=folder.step_of(checkpoint))
    run.settings.save()
    run.trainer.add_callback(MetricsWriter(where / folder.METRICS))
    run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.method.save(where)
    run.tokenizer.save_pretrained(where)
    labels = run.model.config.id2label if run.head == "classification" else {}
    if labels:
        folder.save_labels(where, labels)
    card.write(
        where,
        base_model=str(run.settings.model.model_name_or_path),
        data=_data_name(run.settings),
        head=run.head,
        num_labels=len(labels),
        method=run.method,
        record=run.allocation.record if run.allocation else None,
        log=run.trainer.state.log_history,
    )


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
