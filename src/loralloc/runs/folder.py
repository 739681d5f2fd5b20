"""The run folder: what lies in it under which name, what it holds, and how it is cleared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralloc.allocation.record import FILE_NAME as RECORD
from loralloc.methods.in_place import CONFIG_NAME as METHOD_CONFIG
from loralloc.methods.in_place import WEIGHTS_NAME as WEIGHTS
from loralloc.tasks.conversations import Common
from loralloc.training.drive import STATE_NAME as METHOD_STATE

SETTINGS = "settings.json"
"""Every setting with its source."""

METRICS = "metrics.jsonl"
"""Every log entry, a line each."""

LABELS = "labels.json"
"""Names of a classifier's labels, in the order of its logits."""

CONVERSATION = "conversation.json"
"""What all conversations of the training data have in common; there only if these were rows."""

CHAT_TEMPLATE = "chat_template.jinja"
"""The tokenizer's chat template, which an overwritten run may have had and the new one not."""

CARD = "README.md"
"""What was trained and how to load it."""

PEFT_CONFIG = "adapter_config.json"
"""PEFT's description of an adapter."""

DEMO = "demo.json"
"""What the demo measured before and after."""

ANSWERS = "answers.jsonl"
"""A run's answers to the questions of MT-Bench."""

EVALUATIONS = "eval"
"""Folder of predictions and figures on test data."""

CHECKPOINTS = "checkpoint-*"
"""Folders of what training goes on from."""

FILES = (
    *(SETTINGS, METRICS, LABELS, CONVERSATION, CHAT_TEMPLATE, CARD, DEMO, ANSWERS),
    *(PEFT_CONFIG, METHOD_CONFIG, WEIGHTS, RECORD),
    *(f"{METHOD_STATE}.json", f"{METHOD_STATE}.safetensors"),
)
"""Files that a run, or what looks at it, writes into its folder."""

FOLDERS = (CHECKPOINTS, EVALUATIONS)
"""Folders likewise."""


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in (SETTINGS, RECORD, METHOD_CONFIG, PEFT_CONFIG))


def clear(folder: Path) -> None:
    """Remove what a run writes from its folder, and what was found out about it; nothing else."""
    for pattern in FOLDERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; one that a kill cut short is passed over."""
    whole = [
        path
        for path in Path(folder).glob(CHECKPOINTS)
        # Trainer writes its state last.
        if path.name.rpartition("-")[2].isdigit() and (path / "trainer_state.json").is_file()
    ]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps taken before a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


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


def forget_metrics(folder: Path, *, after: int) -> None:
    """Drop the entries of steps that a resumed run takes again."""
    path = folder / METRICS
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= after]
        path.write_text("".join(kept), encoding="utf-8")


def save_labels(folder: Path, labels: Sequence[str]) -> None:
    """Write the names of a classifier's labels, which PEFT does not keep."""
    text = json.dumps(list(labels), ensure_ascii=False)
    (folder / LABELS).write_text(text + "\n", encoding="utf-8")


def saved_labels(folder: Path) -> list[str]:
    """The names that `save_labels` wrote.

    Raises:
        ValueError: There are none.
    """
    path = folder / LABELS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {LABELS}, so its labels have no names.")
    labels: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return labels


def save_conversation(folder: Path, conversation: Common) -> None:
    """Write what the training data's conversations have in common, for answering alike."""
    text = json.dumps(conversation.as_data(), indent=1, ensure_ascii=False)
    (folder / CONVERSATION).write_text(text + "\n", encoding="utf-8")


def saved_conversation(folder: Path) -> Common | None:
    """What `save_conversation` wrote; None of a run that was not trained on conversations."""
    path = folder / CONVERSATION
    if not path.is_file():
        return None
    return Common(**json.loads(path.read_text(encoding="utf-8")))


def config_of(folder: Path) -> Path | None:
    """The file that describes a folder's adapter: PEFT's, or a method's own."""
    paths = (folder / PEFT_CONFIG, folder / METHOD_CONFIG)
    return next((path for path in paths if path.is_file()), None)


def adapter_config(folder: Path) -> dict[str, Any]:
    """What describes a folder's adapter.

    Raises:
        ValueError: The folder holds no trained adapter.
    """
    path = config_of(folder)
    if path is None:
        raise ValueError(
            f"{folder} holds no {PEFT_CONFIG} and no {METHOD_CONFIG}, so no trained adapter; "
            "name the folder of a finished run."
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
