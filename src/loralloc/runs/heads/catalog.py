"""Every head by name, and which one a run trains."""

from __future__ import annotations

from loralloc.runs.arguments import RunArguments
from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.heads.head import Head
from loralloc.runs.heads.lm import LM
from loralloc.runs.heads.span import SPAN
from loralloc.tasks.task import Task

HEADS = {"lm": LM, "classification": CLASSIFICATION, "span": SPAN}


def choose_head(options: RunArguments, task: Task | None, *, model: str, is_encoder: bool) -> Head:
    """The head that is asked for, or the one that suits model and task.

    Raises:
        ValueError: Model, task and head do not go together.
    """
    chosen = _automatic(task, model, is_encoder) if options.head == "auto" else HEADS[options.head]
    chosen.check(model, task, is_encoder)
    return chosen


def _automatic(task: Task | None, model: str, is_encoder: bool) -> Head:
    for head in HEADS.values():
        if head.suits(task, is_encoder):
            return head
    assert task is not None, "without a task, every model has a head that suits it"
    raise ValueError(
        f"{model} is an encoder and cannot generate, and the task {task.name} is to generate text; "
        "use a causal language model."
    )
