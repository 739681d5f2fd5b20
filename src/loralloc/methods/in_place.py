"""Methods that put modules of their own into a backbone, and save nothing but their weights.

The model stays the class that Transformers gave, so that it trains, generates and reports as any
other; the modules are registered in it under names of their own, and act through hooks.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import TaskType
from safetensors.torch import save_file
from torch import nn

from loralloc.allocation.files import read_json, read_tensors, write_text
from loralloc.methods.method import Method, freeze, trainable

CONFIG_NAME = "method.json"
"""Names a saved adapter that is not PEFT's: its method, options and structure."""

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(kw_only=True)
class InPlaceMethod(Method):
    """A method that changes the model it is given and returns the same."""

    @abstractmethod
    def insert(self, model: Any) -> None:
        """Register the method's modules and hooks, and let its weights train (float32)."""

    def structure(self) -> dict[str, Any]:
        """What was found by searching, as plain data."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Give the prepared model a structure that was found."""

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`."""
        freeze(model)
        self.model, self._task_type, self._heads = model, task_type, tuple(heads)
        model.loralloc_method = self  # what opens or generates with the model may ask
        self.insert(model)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        return model

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The method's own weights that train now, by name: the heads are not among them."""
        return {
            name: parameter
            for name, parameter in trainable(self.model).items()
            if not name.startswith(tuple(f"{head}." for head in self._heads))
        }

    def num_trained(self) -> int:
        """See `Method.num_trained`."""
        return sum(parameter.numel() for parameter in self.adapter_parameters().values())

    def save(self, folder: Path, **options: Any) -> None:
        """See `Method.save`."""
        if not options.get("is_main_process", True):
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(self.model).items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        data = {
            "method": self.about.name,
            "options": self.options(),
            "structure": self.structure(),
            "task_type": self._task_type.value,
            "heads": list(self._heads),
            "base_model_name_or_path": self.model.config._name_or_path,
        }
        text = json.dumps(data, indent=1)
        write_text(folder / CONFIG_NAME, text + "\n")

    def check_saved(self, folder: Path) -> None:
        """See `Method.check_saved`."""
        data = read_config(folder)
        if data["method"] != self.about.name:
            raise ValueError(
                f"The adapter in {folder} is of the method {data['method']}, not of "
                f"{self.about.name}; go on with the method that the run was begun with."
            )
        for name, value in self.options().items():
            if data["options"].get(name) != value:
                raise ValueError(
                    f"The adapter in {folder} was begun with `{name}` of "
                    f"{data['options'].get(name)}, and now it is {value}; go on with the value "
                    "that it was begun with."
                )

    def load(self, folder: Path) -> None:
        """See `Method.load`.

        Raises:
            ValueError: The folder's weights are not those of this method and its options.
        """
        self.restructure(read_config(folder)["structure"])
        saved, now = read_tensors(folder / WEIGHTS_NAME), trainable(self.model)
        wrong = [n for n in {*saved, *now} if n not in saved or n not in now] or [
            name for name, tensor in saved.items() if tensor.shape != now[name].shape
        ]
        if wrong:
            raise ValueError(
                f"The adapter in {folder} does not fit this model, beginning with {min(wrong)}; "
                "use the model that it was trained with."
            )
        for name, tensor in saved.items():
            now[name].data.copy_(tensor)


def read_config(folder: Path) -> dict[str, Any]:
    """What `method.json` of a folder says."""
    return read_json(folder / CONFIG_NAME)
