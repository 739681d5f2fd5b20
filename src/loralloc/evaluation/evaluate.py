"""From a run folder to predictions and figures on a task."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loralloc.evaluation.figure import Figure
from loralloc.evaluation.metrics import check_packages, measure, score_example
from loralloc.evaluation.predictions import Predictions
from loralloc.evaluation.predictors import WAYS, Predictor
from loralloc.evaluation.request import Decoding, Request, folder_of
from loralloc.runs.folder import saved_conversation
from loralloc.runs.heads.head import Head
from loralloc.runs.trained import head_of, saved_settings
from loralloc.tasks.catalog import get_task, load_task
from loralloc.tasks.columns import merge_references, to_examples
from loralloc.tasks.source import SPELLINGS, Split
from loralloc.tasks.task import Example, Task

PACKAGES = ("loralloc", "peft", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a run: examples that are loaded and checked."""

    request: Request
    task: Task
    head: Head
    examples: list[Example]
    """What is measured: rows with one prompt are one example where texts are generated."""

    num_in_split: int
    """Examples of the whole split."""

    source: str
    """Where the rows came from."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Asked):
    """What is asked of a run, and its predictions so far."""

    decoding: Decoding | None
    """How a language model answers; None for encoders."""

    predictions: Predictions
    """Those that are there already, and those to come."""

    @property
    def num_left(self) -> int:
        """Examples that are still without a prediction."""
        return len(self.examples) - len(self.predictions.done)


def prepare(request: Request) -> Evaluation:
    """Find the run's head, task and data, and what an earlier call has predicted.

    Raises:
        ValueError: If the folder holds no finished run, options do not fit it, the task has no
            metric, the data cannot be read, or the results' folder holds something else; one
            sentence.
        ModuleNotFoundError: What measures the task is not installed.
    """
    head = head_of(request.run)
    saved, conversation = saved_settings(request.run), saved_conversation(request.run)
    task = _task(request, saved)
    if not task.metrics:
        raise ValueError(
            f"The task {task.name} is only trained on and has no metric; name another."
        )
    check_packages(task.metrics)
    way, metric = WAYS[head.name], task.metrics[0]
    decoding = way.settle(request, task)
    asked = read(request)
    chosen = asked.examples
    folder = folder_of(request, head=head.name, task=task, decoding=decoding)
    predictions = Predictions(
        folder,
        settings={
            "model": saved.get("model_name_or_path"),
            "adapter": None if request.base else _fingerprint(request.run),
            "head": head.name,
            "task": task.name,
            "split": request.split,
            **(decoding.as_data() if decoding else {}),
            **({"conversation": conversation.as_data()} if conversation else {}),
        },
        prompts=[way.shown(example) for example in chosen],
        gold=[list(e.references) or e.response for e in chosen],
        score=lambda index, text: score_example(metric, text, chosen[index]),
        replaces=request.overwrite,
    )
    return Evaluation(**vars(asked), decoding=decoding, predictions=predictions)


def read(request: Request) -> Asked:
    """Find the run's head, task and data.

    Raises:
        ValueError: If the folder holds no finished run, or the data cannot be read.
    """
    saved = saved_settings(request.run)
    task = _task(request, saved)
    split = _split(request, saved, task)
    examples = to_examples(split, task)
    if "bleu" in task.metrics:  # several texts for one prompt, not several rows to get right
        examples = merge_references(examples)
    return Asked(
        request=request,
        task=task,
        head=head_of(request.run),
        examples=examples[: request.limit],
        num_in_split=len(examples),
        source=split.source,
    )


def load(evaluation: Evaluation) -> Predictor:
    """Load the model of an evaluation.

    Raises:
        ValueError: If the model does not fit the task or its data; one sentence.
    """
    return WAYS[evaluation.head.name].load(
        evaluation.request,
        evaluation.task,
        evaluation.examples,
        decoding=evaluation.decoding,
        saved=saved_settings(evaluation.request.run),
    )


def predict(
    evaluation: Evaluation, predictor: Predictor, *, on_batch: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Predict what is left, batch by batch, keeping each on disk.

    The batches are those of all examples, whichever are done, so that an evaluation which was
    interrupted ends with the predictions of one that was not.

    Args:
        evaluation: What `prepare` gave.
        predictor: What `load` gave.
        on_batch: Called with the number of examples done after each batch.

    Returns:
        What is known of this call: its seconds, the examples predicted in them, batch size, type
        and device.
    """
    kept = evaluation.predictions
    before, start = len(kept.done), time.perf_counter()
    for group in predictor.groups:
        left = [index for index in group if index not in kept.done]
        if not left:
            continue
        kept.add(left, predictor.predict(left), predictor.truncated)
        if on_batch:
            on_batch(len(kept.done))
    parameter = next(predictor.model.parameters())
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "num_predicted": len(kept.done) - before,
        "batch_size": evaluation.request.batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def finish(evaluation: Evaluation, call: Mapping[str, Any] | None = None) -> list[Figure]:
    """Measure all predictions and write `eval.json`.

    Args:
        evaluation: With a prediction for every example.
        call: What `predict` gave; None where an earlier call predicted everything.

    Returns:
        Every figure of the task's metrics.
    """
    kept, task = evaluation.predictions, evaluation.task
    figures = measure(task.metrics, kept.texts, evaluation.examples, labels=task.labels)
    facts = {
        "figures": [asdict(figure) for figure in figures],
        "num_examples": len(evaluation.examples),
        "num_in_split": evaluation.num_in_split,
        "num_truncated": kept.num_truncated,
        "source": evaluation.source,
        "score": task.metrics[0],
        "last_call": call or kept.before.get("last_call"),
        "versions": {name: version(name) for name in PACKAGES},
    }
    kept.finish(facts)
    return figures


def _task(request: Request, saved: Mapping[str, Any]) -> Task:
    name = request.task or saved.get("task")
    if name is None:
        raise ValueError(
            f"The run in {request.run} was trained without a task, so there is no metric; name a "
            "task with `--task`."
        )
    task = get_task(name)
    if "judge" in task.metrics:
        raise ValueError(f"The answers to {name} are compared by a judge; use `loralloc judge`.")
    return task


def _split(request: Request, saved: Mapping[str, Any], task: Task) -> Split:
    """Load the split asked for, of the data asked for."""
    data, config = request.data, None
    if data is None and task.name == saved.get("task"):
        data, config = saved.get("dataset_name"), saved.get("dataset_config")
    if request.split not in SPELLINGS:
        return load_task(task, data, config=config, split_names={"test": request.split})["test"]
    splits = load_task(task, data, config=config)
    if request.split not in splits:
        raise ValueError(
            f"{data or task.hub_name} has no {request.split} split, only {', '.join(splits)}; "
            "name one with `--split`, or other data with `--data`."
        )
    return splits[request.split]


def _fingerprint(run: Path) -> str:
    """What tells this adapter from another in the same folder."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        path = run / name
        if path.is_file():
            return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    raise ValueError(
        f"{run} holds no adapter_model.safetensors, so no trained adapter; name the folder of a "
        "finished run."
    )
