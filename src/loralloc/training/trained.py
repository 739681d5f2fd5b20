"""Opening a run folder again, with stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loralloc.training.models import load_model, load_tokenizer
from loralloc.training.settings import saved


def load_trained(folder: Path, *, with_adapter: bool = True) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer of a finished language-model run.

    Raises:
        ValueError: The folder holds no finished run, or its model does not generate.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no adapter_config.json, so no trained adapter; name the folder of a "
            "finished run."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("task_type") != "CAUSAL_LM":
        raise ValueError(
            f"The adapter in {folder} is for {config.get('task_type')}, which generates no text."
        )
    name = config["base_model_name_or_path"]
    if (folder / "settings.json").is_file():
        name = saved(folder)["model_name_or_path"]
    model: Any = load_model(name)
    if with_adapter:
        model = PeftModel.from_pretrained(model, folder)
    return model, load_tokenizer(str(folder))
