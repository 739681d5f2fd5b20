"""Opening a run folder again: with stock PEFT, where its adapter is one of PEFT's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loralloc.methods.opening import open_adapter
from loralloc.runs.folder import LABELS, SETTINGS, adapter_config
from loralloc.runs.machine import accelerator
from loralloc.runs.models import Head, load_model, load_tokenizer
from loralloc.runs.settings import saved

HEADS: dict[str, Head] = {"CAUSAL_LM": "lm", "SEQ_CLS": "classification", "QUESTION_ANS": "span"}
"""PEFT's task types and the heads that runs have."""


def head_of(folder: Path) -> Head:
    """The head that a finished run was trained with.

    Raises:
        ValueError: The folder holds no finished run, or an adapter for something else.
    """
    task_type = adapter_config(folder).get("task_type")
    if task_type not in HEADS:
        raise ValueError(
            f"The adapter in {folder} is for {task_type}; runs of loralloc are for "
            f"{', '.join(HEADS)}."
        )
    return HEADS[task_type]


def load_trained(
    folder: Path, *, with_adapter: bool = True, head: Head = "lm"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, on the machine's accelerator where it has one, and tokenizer of a finished run.

    Args:
        folder: The run folder.
        with_adapter: False for the model as it was before the run; only a language model has a
            head then.
        head: What the model is to be used for, as `head_of` says it.

    Raises:
        ValueError: The folder holds no finished run, or the run has another head.
    """
    config = adapter_config(folder)
    if HEADS.get(str(config.get("task_type"))) != head:
        does = "which generates no text" if head == "lm" else f"which has no {head} head"
        raise ValueError(f"The adapter in {folder} is for {config.get('task_type')}, {does}.")
    if head != "lm" and not with_adapter:
        raise ValueError(
            f"The {head} head in {folder} was trained with the adapter, so without it there is "
            "none to compare with; leave the adapter in."
        )
    settings = saved(folder) if (folder / SETTINGS).is_file() else {}
    name = settings.get("model_name_or_path") or config["base_model_name_or_path"]
    options = {**_backbone_options(settings), **_head_options(folder, head)}
    model: Any = load_model(name, head=head, **options)
    if with_adapter:
        model = open_adapter(model, folder)
    return model.to(accelerator()), load_tokenizer(str(folder))


def _backbone_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As the run loaded its backbone."""
    dtype = settings.get("dtype")
    return {
        "dtype": None if dtype in (None, "auto") else getattr(torch, dtype),
        "revision": settings.get("model_revision") or "main",
        "trust_remote_code": bool(settings.get("trust_remote_code")),
    }


def _head_options(folder: Path, head: Head) -> dict[str, Any]:
    """As a run loads its backbone: a small one in float32 below a head that is trained."""
    if head == "lm":
        return {}
    if head == "span":
        return {"dtype": torch.float32}
    path = folder / LABELS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {LABELS}, so its labels have no names.")
    labels = json.loads(path.read_text(encoding="utf-8"))
    return {
        "dtype": torch.float32,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
