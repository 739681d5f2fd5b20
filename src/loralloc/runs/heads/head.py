"""What a head is to a run: all that depends on the type of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase, Trainer

from loralloc.tasks.source import Split
from loralloc.tasks.task import Task

if TYPE_CHECKING:
    from loralloc.runs.arguments import RunArguments
    from loralloc.runs.settings import Settings

Rows = tuple[dict[str, Split], tuple[str, ...]]
"""Splits in the columns that a head's trainer reads, and the names of its labels, if it has any."""


class MakeTrainer(Protocol):
    """Makes a trainer for splits of a head's rows, numbered."""

    def __call__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        splits: Mapping[str, Split],
        settings: Settings,
    ) -> Trainer:
        """The trainer, with its data prepared."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A type of task, from its name to its trainer; a run asks this and no name."""

    name: str
    """The name in commands and messages."""

    task_type: TaskType
    """PEFT's name of it, by which a saved adapter is told."""

    auto_class: str
    """Transformers' class that loads a backbone with this head."""

    suits: Callable[[Task | None, bool], bool]
    """Whether it is taken where none is asked for; by the task, and whether the model is an
    encoder."""

    check: Callable[[str, Task | None, bool], None]
    """Refuses a model, by its name and whether it is an encoder, and a task that do not go with
    it, in a sentence."""

    rows: Callable[[Mapping[str, Split], Task | None, RunArguments], Rows]
    """From the rows of a task, or of columns that the options name, to those of the trainer."""

    trainer: MakeTrainer
    """From rows to a trainer."""

    measures: Mapping[str, bool]
    """What its evaluations compute, by Trainer's names, and of which the greater is the better."""

    dtype: torch.dtype | None = None
    """Type of the weights where none is asked for; None for what the machine computes fastest."""

    is_new: bool = False
    """Whether it is drawn at random, so that it trains and is saved with the adapter."""

    has_labels: bool = False
    """Whether its outputs have names, which PEFT does not keep."""

    generates: bool = False
    """Whether it writes text."""

    @property
    def lack(self) -> str:
        """What is to be said of a run that has another head than this."""
        return "generates no text" if self.generates else f"has no {self.name} head"
