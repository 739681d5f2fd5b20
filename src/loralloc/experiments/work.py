"""Carrying out one cell: train, test, and leave in its folder what came of it.

A cell is finished when its folder holds `result.json`, and is not run again. `trained.json` says
that it is trained; until then a run that was begun goes on from its last checkpoint.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from loralloc.experiments.cell import Cell, digest_of
from loralloc.experiments.files import locked, read_json, write_json
from loralloc.methods.gated import GatedLora
from loralloc.methods.in_place import WEIGHTS_NAME as WEIGHTS

if TYPE_CHECKING:
    from loralloc.evaluation.figure import Figure
    from loralloc.experiments.cost import Clock
    from loralloc.runs.run import Run

LORA_A, PEFT_PREFIX = ".lora_A.weight", "base_model.model."
"""Names of a rank's rows in a saved adapter."""

RESULT, TRAINED, FAILURE = "result.json", "trained.json", "failure.json"
NOT_RUN = "it has not been run yet"
TEST_FOLDER, ASKED = "eval/test", "asked.json"
DIGITS = 5
"""Of the loss of an example, which float32 does not hold much better."""

PACKAGES = ("torch", "transformers", "peft", "trl")

Result = Mapping[str, Any]
"""What `result.json` holds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one cell."""

    cell: Cell
    result: Result | None
    """None where it failed."""

    failure: str = ""
    """Why it failed, in a sentence."""

    ran: bool = True
    """Whether it was carried out now; False where it was finished before."""


def finished(cell: Cell) -> Result | None:
    """The result of a cell that is finished; None of any other."""
    found = read_json(cell.folder / RESULT)
    if found is None:
        return None
    if cell.test is not None:
        before = found["cell"]["test"]
        if found["test"] is None or before is None or digest_of(before) != digest_of(cell.test):
            return None  # not tested, or in another way
    return {**found, "cell": cell.as_data()}


def attempt(cell: Cell) -> Outcome:
    """Carry out a cell; what goes wrong is its outcome, and is written into its folder."""
    done = finished(cell)
    if done is not None:
        return Outcome(cell=cell, result=done, ran=False)
    try:
        return Outcome(cell=cell, result=run_cell(cell))
    except Exception as error:  # a hole in the table, with its reason
        return failed(cell, error)


def failed(cell: Cell, error: BaseException) -> Outcome:
    """The outcome of a cell that an error ended, which is written into its folder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    trace = "".join(traceback.format_exception(error))
    write_json(cell.folder / FAILURE, {"reason": reason, "traceback": trace})
    return Outcome(cell=cell, result=None, failure=reason)


def why_it_failed(cell: Cell) -> str:
    """The reason that the last attempt at a cell left, if it failed."""
    found = read_json(cell.folder / FAILURE)
    return "" if found is None else str(found["reason"])


def run_cell(cell: Cell) -> Result:
    """Carry out what is still to be done of a cell.

    Raises:
        Exception: As training and testing do.
    """
    with locked(cell.folder):
        done = finished(cell)  # by the process that held the lock
        if done is not None:
            return done
        (cell.folder / FAILURE).unlink(missing_ok=True)
        trained = read_json(cell.folder / TRAINED)
        if trained is None:
            trained = train_cell(cell)
            write_json(cell.folder / TRAINED, trained)
        result = {
            **trained,
            "test": None if cell.test is None else test_cell(cell),
            "versions": {name: version(name) for name in PACKAGES},
        }
        write_json(cell.folder / RESULT, {"cell": cell.anywhere(), **result})
        return {"cell": cell.as_data(), **result}


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train a cell, from its last checkpoint where there is one.

    Returns:
        As `Begun.facts`.
    """
    import loralloc

    begun = begin_cell(cell)
    loralloc.train(begun.run)
    facts = begun.facts()
    free(begun.run)
    return facts


def begin_cell(cell: Cell, *, prepare: Callable[..., Run] | None = None) -> Begun:
    """The run of a cell, ready to be trained, from its last checkpoint where there is one.

    Args:
        cell: What is to be trained.
        prepare: What prepares its run in the place of `loralloc.prepare`, with the same arguments.
    """
    from transformers import PrinterCallback

    import loralloc
    from loralloc.experiments.cost import Clock, reset_peak
    from loralloc.runs.folder import holds_run
    from loralloc.training.seal import newest_whole

    resume = newest_whole(cell.folder) is not None
    overwrite = not resume and holds_run(cell.folder)
    (cell.folder / TRAINED).unlink(missing_ok=True)  # of a run that is about to be replaced
    options = {**cell.options, "output_dir": str(cell.folder)}
    reset_peak()
    run = (prepare or loralloc.prepare)(options, resume=resume, overwrite=overwrite)
    run.trainer.remove_callback(PrinterCallback)
    clock = Clock(run.checkpoint)
    run.trainer.add_callback(clock)
    return Begun(cell=cell, run=run, clock=clock, num_trained=run.method.num_trained())


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The run of a cell, and what is known of it from its start."""

    cell: Cell
    run: Run
    clock: Clock
    num_trained: int
    """Parameters that train at first."""

    def facts(self) -> dict[str, Any]:
        """What `trained.json` holds, once the run is trained.

        Parameters, ranks, losses, steps, seconds and memory of the run.
        """
        from loralloc.experiments.cost import peak_bytes
        from loralloc.training.way_of_running import planned_length

        method, trainer = self.run.method, self.run.trainer
        args = trainer.args
        return {
            "size": {method.size: method.chosen_size()} if method.size else {},
            "parameters": {
                "budget": self.cell.options.get("budget"),
                "trained": self.num_trained,
                "stored": method.num_stored(),
                "over_budget": method.over_budget(),
            },
            "findings": method.findings(),
            "search_steps": method.search_steps(planned_length(trainer).num_steps),
            "ranks": _ranks(self.run),
            "dev_loss": float(trainer.evaluate()["eval_loss"]),
            "steps": trainer.state.global_step,
            "max_steps": trainer.state.max_steps,
            "examples_per_step": args.per_device_train_batch_size
            * args.gradient_accumulation_steps,
            "seconds": self.clock.seconds,
            "peak_bytes": peak_bytes(alone=self.cell.alone),
            "device": self.run.model.device.type,
        }


def test_cell(cell: Cell) -> dict[str, Any]:
    """Test a trained cell; an interrupted test goes on.

    Returns:
        Figures, cross-entropy, and the scores and losses of every example. Of a task without a
        metric the cross-entropy is all.
    """
    assert cell.test is not None, "the cell is not to be tested"
    if "questions" in cell.test:
        return _answer(cell)
    from loralloc.evaluation import evaluate
    from loralloc.evaluation.cross_entropy import cross_entropies
    from loralloc.evaluation.request import Request
    from loralloc.tasks.catalog import get_task

    begin = time.perf_counter()
    folder, this = cell.folder / TEST_FOLDER, {"digest": digest_of(cell.test)}
    other = (read_json(folder / ASKED) or this) != this
    request = Request(run=cell.folder, output_dir=folder, overwrite=other, **dict(cell.test))
    asked = (evaluate.prepare if get_task(cell.task).metrics else evaluate.read)(request)
    figures: list[Figure] = []
    scores: list[float | None] | None = None
    if isinstance(asked, evaluate.Evaluation):
        write_json(folder / ASKED, this)  # so that another test does not go on from this one
        call = evaluate.predict(asked, evaluate.load(asked)) if asked.num_left else None
        figures, scores = evaluate.finish(asked, call), _scores(folder)
    losses = cross_entropies(asked)
    _collect()
    return {
        "figures": [
            {
                "name": figure.name,
                "value": figure.value,
                "implementation": figure.implementation,
                "missing": figure.missing,
            }
            for figure in figures
        ],
        "num_examples": len(asked.examples),
        "num_in_split": asked.num_in_split,
        "cross_entropy": losses.mean,
        "examples": {
            "scores": scores,
            "losses": [round(loss, DIGITS) for loss in losses.by_example],
        },
        "seconds": time.perf_counter() - begin,
    }


def _answer(cell: Cell) -> dict[str, Any]:
    """Answers to the questions of MT-Bench, which a judge reviews when all are there."""
    from loralloc.evaluation.judge.answers import Answering
    from loralloc.evaluation.judge.contestants import contestant
    from loralloc.evaluation.judge.questions import GPT4_ANSWERS_NAME, load_questions, read_answers
    from loralloc.evaluation.judge.results import rouge_l_to

    assert cell.test is not None
    options = dict(cell.test)
    data = options.pop("questions")
    begin = time.perf_counter()
    questions = load_questions(data)
    one = contestant(
        str(cell.folder),
        questions,
        name=cell.folder.name,
        decoding=Answering(**options),
        output_dir=cell.folder,
    )
    gpt4 = Path(data) / GPT4_ANSWERS_NAME
    figures = []
    if gpt4.is_file():
        overlap = rouge_l_to(read_answers(gpt4), one.answers, questions)
        figures = [
            {
                "name": overlap.name,
                "value": overlap.value,
                "implementation": overlap.implementation,
                "missing": overlap.missing,
            }
        ]
    _collect()
    return {
        "figures": figures,
        "num_examples": len(questions),
        "num_in_split": len(questions),
        "cross_entropy": None,
        "examples": None,
        "answers": one.source.name,
        "seconds": time.perf_counter() - begin,
    }


def _scores(folder: Path) -> list[float | None]:
    """Of every example, in their order."""
    from loralloc.evaluation.predictions import PREDICTIONS_NAME

    text = (folder / PREDICTIONS_NAME).read_text(encoding="utf-8")
    return [json.loads(line)["score"] for line in text.split("\n")[:-1]]


def _ranks(run: Run) -> dict[str, dict[str, int]] | None:
    """The rank of every module at first and at the end, of a method that ends as LoRA.

    Those at first are there only of a method that moves ranks.
    """
    path = run.settings.output_dir / WEIGHTS
    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if name.endswith(LORA_A)]  # noqa: SIM118
        final = {
            name.removesuffix(LORA_A).removeprefix(PEFT_PREFIX): weights.get_slice(
                name
            ).get_shape()[0]
            for name in names
        }
    if not final:
        return None
    initial: dict[str, int] = {}
    if run.allocation:
        initial = dict(run.allocation.record.initial_ranks)
    elif isinstance(run.method, GatedLora):
        initial = run.method.initial_ranks
    return {"initial": initial, "final": final}


def free(run: Run) -> None:
    """Let go of a model before the next one is loaded."""
    run.trainer.accelerator.free_memory()
    run.trainer.model = None
    _collect()


def _collect() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
