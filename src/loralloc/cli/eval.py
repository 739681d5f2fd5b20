"""`loralloc eval`: a run's figures on a task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from loralloc.evaluation.evaluate import Evaluation
    from loralloc.evaluation.figure import Figure

DESCRIPTION = """\
Predict a split of a task with a run's model, and measure the predictions. They are kept as they
come: the same command again goes on where it was interrupted. Results go to a folder of this
evaluation's own in the run folder, such as RUN/eval/sst2-test-beam5: eval.json with the figures
and what computed them, predictions.jsonl with prompt, gold, prediction and score.

A run on data of its own, without a task, is measured by its loss and accuracy, a language model
by its perplexity too: on the test split, or without one on what the run held out.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "eval",
        help="measure a run on a task",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--task", metavar="NAME", help="default: the run's task")
    parser.add_argument(
        "--data", metavar="DATA", help="a folder, a file or a Hub name (default: the run's data)"
    )
    parser.add_argument("--split", help="train, validation, test or its own name (default test)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument("--batch_size", type=int, default=32, help="most at once (default 32)")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="default: RUN/eval/TASK-SPLIT-DECODE"
    )
    parser.add_argument("--overwrite", action="store_true", help="forget an earlier evaluation")
    answers = parser.add_argument_group("how a language model answers")
    answers.add_argument(
        "--decode",
        choices=("beam", "greedy", "labels"),
        help=(
            "beam search as in the paper (default), greedy, or the most probable of the task's "
            "labels (fast; not the paper's decoding)"
        ),
    )
    answers.add_argument("--num_beams", type=int, metavar="N", help="default 5; 1 is greedy")
    answers.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="default: the longest label's and the end token; answers 64; other texts 128",
    )
    answers.add_argument("--base", action="store_true", help="without the adapter, to compare")
    answers.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with the model run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict, measure and print the table."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    from loralloc.evaluation import evaluate
    from loralloc.evaluation.request import Request
    from loralloc.runs.trained import has_task

    out = Console()
    if args.task is None and not has_task(args.folder):
        return _held_out(args, out)
    args.split = args.split or "test"
    request = Request(
        run=args.folder,
        task=args.task,
        data=args.data,
        split=args.split,
        decode=args.decode,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        base=args.base,
        trust_remote_code=args.trust_remote_code,
        output_dir=args.output_dir,
        overwrite=args.overwrite,
    )
    with out.status("reading the data"):
        evaluation = evaluate.prepare(request)
    num_done = len(evaluation.predictions.done)
    if num_done:
        out.print(f"{num_done:,} predictions are there already", highlight=False)
    call = _predict(evaluation, out) if evaluation.num_left else None
    figures = evaluate.finish(evaluation, call)
    _show(evaluation, figures, call, out)
    return 0


def _held_out(args: argparse.Namespace, out: Console) -> int:
    """Figures of a run that has no task."""
    from loralloc.evaluation.held_out import measure_held_out, save

    names = ("decode", "num_beams", "max_new_tokens")
    if given := [name for name in names if getattr(args, name) is not None]:
        raise ValueError(
            f"`--{given[0]}` is for answers to a task, and the run in {args.folder} was trained "
            "without one; leave it out, or name a task with `--task`."
        )
    for name in ("batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` is {value}; it must be at least 1.")
    with out.status("loading data and model"):
        found = measure_held_out(
            args.folder,
            data=args.data,
            split=args.split,
            batch_size=args.batch_size,
            limit=args.limit,
            base=args.base,
            trust_remote_code=args.trust_remote_code,
        )
    folder = save(found, args.folder, base=args.base, output_dir=args.output_dir)
    count, whole = found.num_examples, found.num_in_split
    of_all = f" of {whole:,}" if count < whole else ""
    kind = "tokens" if found.counts_tokens else "labels"
    figures = {"loss": f"{found.loss:.4f} a {kind.removesuffix('s')}"}
    if found.perplexity is not None:
        figures["perplexity"] = f"{found.perplexity:.2f}"
    figures[f"{'token ' if found.counts_tokens else ''}accuracy"] = f"{found.accuracy:.4f}"
    width = max(map(len, figures))
    lines = [
        f"{found.split}: {count:,}{of_all} examples, {found.num_targets:,} {kind} "
        f"({found.source}){', without the adapter' if args.base else ''}",
        *(f"{name:{width}}  {value}" for name, value in figures.items()),
        f"results: {folder}",
    ]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _predict(evaluation: Evaluation, out: Console) -> dict[str, Any]:
    from loralloc.evaluation import evaluate

    with out.status("loading the model"):
        predictor = evaluate.load(evaluation)
    with _bar(out) as bar:
        task = bar.add_task(
            "predicting",
            total=len(evaluation.examples),
            completed=len(evaluation.predictions.done),
        )
        return evaluate.predict(
            evaluation, predictor, on_batch=lambda done: bar.update(task, completed=done)
        )


def _show(
    evaluation: Evaluation, figures: list[Figure], call: dict[str, Any] | None, out: Console
) -> None:
    out.print(_table(evaluation, figures))
    for figure in figures:
        if figure.missing:
            out.print(f"{figure.name}: {figure.missing}", markup=False, highlight=False)
    cut = evaluation.predictions.num_truncated
    if cut:
        end = "beginning" if evaluation.decoding else "end"
        out.print(
            f"{cut:,} prompts are longer than the model's context and were cut at their {end}",
            highlight=False,
        )
    if call:
        out.print(
            f"{call['num_predicted']:,} predictions in {call['seconds']:.1f} s, {call['dtype']} on "
            f"{call['device']}",
            highlight=False,
        )
    out.print(
        f"results: {evaluation.predictions.folder}", markup=False, highlight=False, soft_wrap=True
    )


def _table(evaluation: Evaluation, figures: list[Figure]) -> Table:
    from rich.table import Table

    count, whole = len(evaluation.examples), evaluation.num_in_split
    table = Table(
        title=(
            f"{evaluation.task.name}, {evaluation.request.split}: "
            f"{count:,}{f' of {whole:,}' if count < whole else ''} examples, {_way(evaluation)}"
        ),
        title_justify="left",
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("computed by", overflow="fold", style="dim")
    for figure in figures:
        value = "missing" if figure.value is None else f"{figure.value:.2f}"
        table.add_row(figure.name, value, figure.implementation)
    return table


def _way(evaluation: Evaluation) -> str:
    """How the predictions were made, in words."""
    decoding = evaluation.decoding
    if decoding is None:
        return f"{evaluation.head.name} head"
    ways = {
        "beam": f"{decoding.num_beams} beams",
        "greedy": "greedy",
        "labels": 'decode="labels" (not the paper\'s)',
    }
    return ways[decoding.decode] + (", without the adapter" if evaluation.request.base else "")


def _bar(out: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("examples"),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )
