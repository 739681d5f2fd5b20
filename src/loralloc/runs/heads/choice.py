"""Which head a run trains: a language model's, a classifier's or a span predictor's."""

from __future__ import annotations

from loralloc.runs.models import Head
from loralloc.runs.settings import RunArguments
from loralloc.tasks.catalog import TASKS
from loralloc.tasks.task import Task

READ_BY: dict[str, Head] = {
    "text_column": "classification",
    "text_pair_column": "classification",
    "label_column": "classification",
    "stride": "span",
}
"""Options that only one head reads."""


def choose_head(options: RunArguments, task: Task | None, *, model: str, is_encoder: bool) -> Head:
    """The head that is asked for, or the one that suits model and task.

    Raises:
        ValueError: Model, task and head do not go together, or an option would have no effect.
    """
    head = _automatic(task, model, is_encoder) if options.head == "auto" else options.head
    if head == "lm" and is_encoder:
        raise ValueError(
            f"{model} is an encoder and cannot generate; use `--head classification`, `--head "
            "span` or a causal language model."
        )
    if head == "span" and not is_encoder:
        raise ValueError(
            f"{model} reads in one direction only, and a span is found by reading in both; use an "
            "encoder such as minilm-l6, or `--head lm`."
        )
    if head == "span" and (task is None or not has_spans(task)):
        known = ", ".join(name for name, other in TASKS.items() if has_spans(other))
        given = "no task is named" if task is None else f"the task {task.name} has none"
        raise ValueError(
            f"A span head finds answers that are stretches of a text, and {given}; use one of the "
            f"tasks {known}."
        )
    for name, reader in READ_BY.items():
        if getattr(options, name) is not None and head != reader:
            raise ValueError(
                f"`{name}` is read by the {reader} head, and this run has the {head} head; leave "
                f"it out or use `--head {reader}`."
            )
    return head


def has_spans(task: Task) -> bool:
    """Whether the answers of a task are stretches of a text, which is what f1-em measures."""
    return "f1-em" in task.metrics


def _automatic(task: Task | None, model: str, is_encoder: bool) -> Head:
    if not is_encoder:
        return "lm"
    if task is None or task.labels:
        return "classification"
    if has_spans(task):
        return "span"
    raise ValueError(
        f"{model} is an encoder and cannot generate, and the task {task.name} is to generate text; "
        "use a causal language model."
    )
