"""Opening a run folder again: with stock PEFT, where its adapter is one of PEFT's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from loralloc.methods.opening import open_adapter
from loralloc.runs.folder import SETTINGS, adapter_config, saved_labels
from loralloc.runs.heads.classification import use_padding
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.machine import accelerator
from loralloc.runs.models import backbone_options, load_model, load_tokenizer
from loralloc.runs.permissions import check_granted_again, granted
from loralloc.runs.run import HEADS
from loralloc.runs.settings import saved, saved_values

OF_THE_MODEL = ("trust_remote_code", "attn_implementation", "model_init_kwargs")
"""Options of a run by which its backbone may come with code."""


def head_of(folder: Path) -> Head:
    """The head that a finished run was trained with.

    Raises:
        ValueError: The folder holds no finished run, or an adapter for something else.
    """
    task_type = adapter_config(folder).get("task_type")
    for head in HEADS.values():
        if head.task_type == task_type:
            return head
    known = ", ".join(head.task_type.value for head in HEADS.values())
    raise ValueError(
        f"The adapter in {folder} is for {task_type}; runs of loralloc are for {known}."
    )


def saved_settings(run: Path) -> dict[str, Any]:
    """A run's settings; nothing of an adapter that loralloc did not train."""
    if (run / SETTINGS).is_file():
        return saved(run)
    return {}


def has_task(run: Path) -> bool:
    """Whether a run was trained on a task by name, by whose metric it can be measured."""
    return bool(saved_settings(run).get("task"))


def load_trained(
    folder: Path,
    *,
    with_adapter: bool = True,
    head: Head = LM,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, on the machine's accelerator where it has one, and tokenizer of a finished run.

    Args:
        folder: The run folder.
        with_adapter: False for the model as it was before the run; only a language model has a
            head then.
        head: What the model is to be used for, as `head_of` says it.
        trust_remote_code: Whether code that comes with the backbone may run, where the run was
            trained with some; the folder itself does not grant it.

    Raises:
        ValueError: The folder holds no finished run, or the run has another head, or its backbone
            comes with code that was not trusted.
    """
    config = adapter_config(folder)
    if config.get("task_type") != head.task_type:
        raise ValueError(
            f"The adapter in {folder} is for {config.get('task_type')}, which {head.lack}."
        )
    if head.is_new and not with_adapter:
        raise ValueError(
            f"The {head.name} head in {folder} was trained with the adapter, so without it there "
            "is none to compare with; leave the adapter in."
        )
    labels = saved_labels(folder) if head.has_labels else ()
    model = load_backbone(folder, head=head, labels=labels, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(str(folder))
    if head.is_new:
        use_padding(model, tokenizer)
    # One that is quantised, or spread by a `device_map`, is where it computes and may not be moved.
    is_placed = getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")
    if with_adapter:
        model = open_adapter(model, folder)
    return model if is_placed else model.to(accelerator()), tokenizer


def load_backbone(
    folder: Path,
    *,
    head: Head = LM,
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
    base: str | None = None,
    **replaced: Any,
) -> Any:
    """The backbone that an adapter in a folder was trained on, without the adapter.

    Args:
        folder: A run folder, or any folder with an adapter of PEFT's.
        head: What it is to be used for.
        labels: Names of the head's labels, if it has any.
        trust_remote_code: As `load_trained` has it.
        base: Another name or place of the backbone than the folder says.
        replaced: Options of loading in the place of the run's, such as `dtype`.

    Raises:
        ValueError: The folder names no backbone, or one that comes with code that was not trusted.
    """
    values = saved(folder) if (folder / SETTINGS).is_file() else {}
    if values:
        asked = granted(saved_values(folder))
        of_the_model = {name: asked[name] for name in OF_THE_MODEL if name in asked}
        given = OF_THE_MODEL if trust_remote_code else ()
        check_granted_again(folder, of_the_model, dict.fromkeys(given))
        if trust_remote_code:
            values |= of_the_model
    options = backbone_options(
        _model_settings(values),
        trust_remote_code=trust_remote_code,
        more=values.get("model_init_kwargs"),
    )
    name = backbone_name(folder, base)
    return load_model(name, head=head, labels=labels, **{**options, **replaced})


def backbone_name(folder: Path, base: str | None = None) -> str:
    """The name or place of the backbone that an adapter was trained on.

    Raises:
        ValueError: The folder does not say it, and `base` neither.
    """
    values = saved(folder) if (folder / SETTINGS).is_file() else {}
    config = adapter_config(folder)
    name = base or values.get("model_name_or_path") or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder} does not say which model its adapter is for; use `--base`.")
    return name


def _model_settings(values: dict[str, Any]) -> ModelConfig:
    """The settings of the model among those of a run."""
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name in values]
    return ModelConfig(**{"dtype": None, **{name: values[name] for name in names}})
