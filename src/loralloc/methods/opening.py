"""Opening what a run saved, whatever its method, on a backbone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType

from loralloc.adapters.folder import CONFIG, WEIGHTS
from loralloc.adapters.stranger import check_config, check_fits
from loralloc.allocation.files import read_json
from loralloc.allocation.objective import Batch
from loralloc.methods.catalog import built_in_method
from loralloc.methods.in_place import CONFIG_NAME, read_config
from loralloc.methods.method import Method


def open_adapter(model: Any, folder: str | Path, *, method: type[Method] | None = None) -> Any:
    """Give a backbone the adapter in a folder, ready to predict.

    Stock PEFT opens what methods on PEFT saved; the others put modules of their own into the
    backbone, which only this does.

    Args:
        model: The backbone, with its head.
        folder: A run folder, or a checkpoint.
        method: The class of a method of your own that saved it; a folder never says what to import.

    Returns:
        The adapted model, in evaluation mode.

    Raises:
        ValueError: The adapter is not for this model.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("...")  # doctest: +SKIP
        >>> model = open_adapter(model, "runs/sst2-houlsby")  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        _check(model, folder)
        with warnings.catch_warnings():
            # AdaLoRA's name tensors, not modules; PEFT reads them when it loads the weights.
            warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
            return PeftModel.from_pretrained(model, folder)
    config = read_config(folder)
    kind = built_in_method(config["method"]) if method is None else method
    opened = kind(**config["options"])
    adapted = opened.prepare(model, task_type=TaskType(config["task_type"]), heads=config["heads"])
    opened.load(folder)
    return adapted.requires_grad_(False).eval()


def _check(model: Any, folder: Path) -> None:
    """Refuse what PEFT should not open: pickles, code, and sizes that are not the model's."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        lacks = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        raise ValueError(
            f"{folder} holds no {lacks}, so no adapter that is opened here; save it with PEFT's "
            "`save_pretrained`, which writes no pickles."
        )
    config = read_json(folder / CONFIG)
    check_config(config, [name for name, _ in model.named_modules()], where=str(folder))
    if config.get("peft_type") == "LORA":
        read = LoraConfig.from_pretrained(str(folder))
        check_fits(model, read, folder / WEIGHTS, where=str(folder))


def shares_prompts(model: Any) -> bool:
    """Whether an adapted model may read a prompt in pieces; see `About.shares_prompts`."""
    method = getattr(model, "loralloc_method", None)
    if method is not None:
        return bool(method.about.shares_prompts)
    configs = getattr(model, "peft_config", {}).values()
    return not any(config.is_prompt_learning for config in configs)


def show_batch(model: Any, batch: Batch) -> None:
    """Let a model's method see a batch before the model does; see `Method.watch`."""
    method = getattr(model, "loralloc_method", None)
    if method is not None:
        method.watch(batch)
