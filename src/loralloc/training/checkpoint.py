"""Checkpoints without pickles: the optimiser's tensors in safetensors, all else in JSON."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from loralloc.allocation import replicas
from loralloc.allocation.files import read_json, read_tensors, write_text

NAME = "training_state"
"""Names the two files that hold optimiser, scheduler and random generators."""


class SafeCheckpoints:
    """Mixin for a `transformers.Trainer`, in any number of processes that hold the same.

    Optimiser, scheduler, gradient scaler and the random generators of every process are saved as
    plain data, so that a run folder can be shared and opened without running code from it. A run
    may go on with another number of processes.
    """

    # What Trainer provides, for the type checker.
    args: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # Trainer pickles its arguments there; they are in the run folder's settings.json.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = replicas.gathered(random_state())
        if not self.args.should_save:
            return
        values = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "random": states,
        }
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            values["scaler"] = scaler.state_dict()
        write_state(Path(output_dir), NAME, values)

    def _save_rng_state(self, output_dir: str) -> None:
        """Already saved with the optimiser."""

    def _save_scaler(self, output_dir: str) -> None:
        """Already saved with the optimiser."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint), NAME)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(read_state(Path(checkpoint), NAME)["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = read_state(Path(checkpoint), NAME)["random"]
            # Of processes that were not there, those of the first ones, as at a run's beginning.
            set_random_state(states[self.args.process_index % len(states)])


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Keep nested data: its tensors in `name`.safetensors, all else in `name`.json.

    Args:
        folder: Where to.
        name: Of both files.
        state: Dicts, lists and tuples of tensors, numbers, texts and None.

    Raises:
        TypeError: Something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    values = {key: _take_tensors(value, key, tensors) for key, value in state.items()}
    _part_shared(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    write_text(folder / f"{name}.json", json.dumps(values) + "\n")


def _part_shared(tensors: dict[str, Tensor]) -> None:
    """Give each tensor memory of its own, as a file wants it: bitsandbytes shares its tables."""
    seen = set()
    for path, tensor in tensors.items():
        where = tensor.untyped_storage().data_ptr()
        if where in seen and tensor.numel():
            tensors[path] = tensor.clone()
        seen.add(where)


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """What `write_state` kept.

    Raises:
        ValueError: A file is missing.
    """
    tensors, values = (folder / f"{name}.{kind}" for kind in ("safetensors", "json"))
    for path in (tensors, values):
        if not path.is_file():
            raise ValueError(
                f"{folder} lacks {path.name}, so training cannot go on where it was; resume from a "
                "checkpoint that loralloc wrote."
            )
    kept, data = read_tensors(tensors), read_json(values)
    return {key: _put_tensors(value, kept) for key, value in data.items()}


def drawing_nothing(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's `evaluate` that leaves training's random numbers as they would be without it.

    A checkpoint of a step may be written before the evaluation that follows the step, and a run
    that goes on from there does not evaluate again.
    """

    @functools.wraps(evaluate)
    def evaluate_alike(*args: Any, **kwargs: Any) -> Any:
        before = random_state()
        try:
            return evaluate(*args, **kwargs)
        finally:
            set_random_state(before)

    return evaluate_alike


def stopping_at_the_end(trainer: Trainer) -> Callable[..., None]:
    """A trainer's `_run_epoch` that takes no step beyond the run's last.

    Transformers looks whether a run is over after a step: one that goes on from the checkpoint of
    its last step, in the midst of an epoch, would take another.
    """
    own = trainer._run_epoch

    @functools.wraps(own)
    def run_epoch(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            own(*args, **kwargs)
        else:
            trainer.control.should_training_stop = True

    return run_epoch


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON data, with its tensors moved to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _take_tensors(item, f"{path}.{key}", tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_take_tensors(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A {type(value).__name__} at {path} cannot be kept in a checkpoint.")


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_tensors(item, tensors) for key, item in content}
    items = [_put_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """The states of all random generators that training draws from."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
