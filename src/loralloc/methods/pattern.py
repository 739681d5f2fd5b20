"""LoRA with ranks that were found elsewhere, from scratch.

Where an allocation does better than its own final ranks trained from the start, the way there did
it; where it does not, the ranks did, and a static pattern serves as well.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from loralloc.adapters.stranger import check_config, check_quick
from loralloc.allocation import record
from loralloc.allocation.files import read_json
from loralloc.allocation.resize import resize
from loralloc.methods.lora import CONTROL
from loralloc.methods.method import About
from loralloc.methods.peft_method import LoraShaped, resolve_targets, targeted_shapes

PEFT_CONFIG = "adapter_config.json"

CHOOSING = (
    *("r", "rank_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)
"""Options of PEFT's `LoraConfig` that say which rank a module has."""


@dataclass(kw_only=True)
class Pattern(LoraShaped):
    """y = W x + s B (A x), every module with a rank of its own, for the whole run."""

    file: str | None = None
    """Where the ranks are: a run folder (or a file like its `allocation.json`), an adapter of
    PEFT's (or a file like its `adapter_config.json`), or a JSON file with ranks by module names or
    regular expressions, as `rank_pattern` has them. Modules without a rank are not adapted."""

    about: ClassVar[About] = dataclasses.replace(
        CONTROL,
        name="pattern",
        title="LoRA, ranks given",
        differs="LoRA whose ranks are read from a file (`--method.file`), which is its size too.",
    )
    size: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Refuse modules by name.

        Raises:
            ValueError: Some were named.
        """
        if self.targets is not None:
            raise ValueError(
                f"`lora_target_modules` is {self.targets!r}, but the file of pattern names the "
                "modules; leave it out."
            )

    def count(self, model: nn.Module, size: int) -> int:
        """See `Method.count`.

        Raises:
            ValueError: There is no such file, or it does not fit the model.
        """
        shapes = targeted_shapes(model, resolve_targets(model, None))
        return sum(rank * sum(shapes[name]) for name, rank in self.ranks(model).items())

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of every linear layer of every block of a model, in model order; 0 for none.

        Raises:
            ValueError: There is no such file, or it does not fit the model.
        """
        if self.file is None:
            raise ValueError(
                "pattern trains with ranks that a file gives, and none was named; name a run "
                "folder, an adapter or a JSON file with `--method.file`."
            )
        names = list(targeted_shapes(model, resolve_targets(model, None)))
        return read_ranks(self.file, names)

    def peft_config(self, model: Any, *, task_type: TaskType, heads: Sequence[str]) -> PeftConfig:
        """See `PeftMethod.peft_config`."""
        ranks = [rank for rank in self.ranks(model).values() if rank]
        # The rank of most modules, so that the configuration lists as few others as it can.
        usual = max(sorted(set(ranks)), key=ranks.count)
        return self.lora_config(model, usual, task_type=task_type, heads=heads)

    def prepare(self, model: Any, *, task_type: TaskType, heads: Sequence[str] = ()) -> Any:
        """See `Method.prepare`.

        Raises:
            ValueError: There is no such file, or it does not fit the model.
        """
        wanted = self.ranks(model)
        super().prepare(model, task_type=task_type, heads=heads)
        resize(self.model, wanted)
        return self.model


def read_ranks(path: str | Path, names: Sequence[str]) -> dict[str, int]:
    """The ranks that a file gives to modules.

    Args:
        path: See `Pattern.file`.
        names: Of the modules, in model order.

    Raises:
        ValueError: There is no such file, it is of none of the known forms, names a module that
            there is not, or gives no rank at all.
    """
    file = _file(Path(path))
    try:
        data = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The ranks cannot be read from {file} ({error}); name a run folder, an adapter or a "
            "JSON file."
        ) from error
    if "initial_ranks" in data:
        last = record.Record.read(file).ranks
        found = _by_key({re.escape(name): rank for name, rank in last.items()}, names, file)
    elif "peft_type" in data:
        found = _by_config(data, names, file)
    else:
        found = _by_key(data, names, file)
    if not any(found.values()):
        raise ValueError(f"{file} gives no module of this model a rank; use one that does.")
    return found


def _file(path: Path) -> Path:
    """The file itself, or that of the ranks in a folder."""
    if not path.is_dir():
        return path
    for name in (record.FILE_NAME, PEFT_CONFIG):
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path} holds neither {record.FILE_NAME} nor {PEFT_CONFIG}; name the folder of a run or "
        "of an adapter."
    )


def _by_key(ranks: Mapping[str, Any], names: Sequence[str], file: Path) -> dict[str, int]:
    """Ranks by regular expressions, of which the first that matches holds, as in PEFT."""
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(
                f"{file} gives {key!r:.60} a rank of {rank!r:.60}; it must be a whole number from "
                "0."
            )
    check_quick(ranks, names, where=str(file))
    keys = {name: get_pattern_key(ranks, name) for name in names}
    idle = [key for key in ranks if key not in keys.values()]
    if idle:
        raise ValueError(
            f"{file} gives a rank to {idle[0]!r}, which is no linear layer of this model's blocks, "
            f"or one that an earlier name is for; names look like {names[0]!r}."
        )
    return {name: ranks.get(key, 0) for name, key in keys.items()}


def _by_config(data: Mapping[str, Any], names: Sequence[str], file: Path) -> dict[str, int]:
    """The ranks that PEFT would give these modules."""
    if data["peft_type"] != "LORA":
        raise ValueError(
            f"{file} is of {data['peft_type']!s:.60}, whose modules have no ranks as LoRA's have; "
            "name an adapter of LoRA."
        )
    if not data.get("target_modules"):
        raise ValueError(f"{file} names no `target_modules`; name an adapter that PEFT saved.")
    check_config(data, names, where=str(file))
    config = LoraConfig(**{option: data[option] for option in CHOOSING if data.get(option)})
    patterns = config.rank_pattern
    return {
        name: int(patterns.get(get_pattern_key(patterns, name), config.r))
        if check_target_module_exists(config, name)
        else 0
        for name in names
    }
