"""One run of an experiment: what it trains, how it is tested, and the folder it lives in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run as plain data, which any process on any machine can carry out.

    Cells with the same options are the same run: they share a folder, whichever experiment asks for
    them.
    """

    backbone: str
    """A model's name or folder."""

    task: str
    """What is trained on, by the task's name."""

    method: str
    """How the backbone is adapted, by the name under which it is compared."""

    rank: int
    """The LoRA rank whose parameters are the budget."""

    seed: int
    """Of the run."""

    learning_rate: float
    """The highest of its schedule."""

    options: Mapping[str, Any]
    """Every option of the run but its folder, as `loralloc.prepare` takes them."""

    root: str
    """The folder of all cells."""

    rows: str = ""
    """What tells the rows that it trains on from others, wherever they lie."""

    test: Mapping[str, Any] | None = None
    """How it is tested, by the names of `evaluation.request.Request`; None for a run that is
    only compared on development loss. Of a run that answers MT-Bench: its `questions`."""

    alone: bool = False
    """Whether it needs a process of its own, so that its peak memory is its own."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        method = "".join(c if c.isalnum() or c in "-." else "_" for c in self.method)
        name = f"{method}-r{self.rank}-lr{self.learning_rate:g}-seed{self.seed}"
        return (
            Path(self.root) / Path(self.backbone).name / self.task / f"{name}-{self.digest[:8]}"
        ).absolute()

    @property
    def digest(self) -> str:
        """What tells this run from one with any other option or other rows."""
        # Measured beside other runs, memory would be theirs too: such a run is another one.
        told = {**self.options, **({"alone": True} if self.alone else {})}
        if self.rows:
            told["dataset_name"] = self.rows  # the same rows in another folder are the same run
        text = json.dumps(told, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The cell in a few words."""
        return (
            f"{self.method} r={self.rank} on {self.task}, learning rate {self.learning_rate:g}, "
            f"seed {self.seed}"
        )

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What its seeds and learning rates are compared within."""
        return self.backbone, self.task, self.method, self.rank

    def untested(self) -> Cell:
        """The same run without its test."""
        return replace(self, test=None)

    def as_data(self) -> dict[str, Any]:
        """The cell as JSON has it."""
        return asdict(self)

    def anywhere(self) -> dict[str, Any]:
        """The cell as JSON has it, without what is of this machine."""
        options = {name: v for name, v in self.options.items() if name != "dataset_name"}
        return {**asdict(replace(self, options=options)), "root": ""}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Cell:
        """A cell that `as_data` gave."""
        return Cell(**data)


def digest_of(test: Mapping[str, Any]) -> str:
    """What tells a test from another of the same run, wherever its questions lie."""
    told = dict(test)
    if "questions" in told:
        told["questions"] = Path(told["questions"]).name
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
