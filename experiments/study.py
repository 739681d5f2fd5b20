"""Runs the experiments behind docs/methods.md and docs/study.md, and writes those pages.

Each is a YAML file as `loralloc reproduce` takes it. One run at a time goes task by task and method
by method, so that rows of its table are whole as early as can be; an executor that works on many at
once has a whole experiment, or what is asked for of it. What came of a run is a `result.json` below
experiments/results; what is there is not run again, so the command may be stopped and given again,
here or on another machine.

Run: python experiments/study.py --data FOLDER [NAME ...] [--only METHOD ...] [--tasks TASK ...]
     [--ranks N ...] [--minutes N] [--executor fleet] [--page | --runs]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from method_page import method_page
from study_page import study_page

from loralloc.experiments.cell import Cell
from loralloc.experiments.collected import Section
from loralloc.experiments.executors.executor import EXECUTORS, Executor, Resources, get_executor
from loralloc.experiments.experiment import Experiment, load_experiment, load_scale
from loralloc.experiments.grid import make_grid
from loralloc.experiments.reproduce import carry_out_all
from loralloc.experiments.work import Outcome
from loralloc.runs.quiet import prepare_process

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "experiments"
METHODS = "methods"
ONE_AT_A_TIME = "process"

NAMES = (
    "ceiling-minilm-few",
    "ceiling-minilm-pass",
    METHODS,
    "ceiling-smollm2-few",
    "ceiling-smollm2-pass",
    "shrink-minilm",
    "allocation-minilm",
    "allocation-smollm2",
)
"""In the order in which their answers are needed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--only", nargs="+", metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", metavar="TASK")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="N")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after")
    parser.add_argument("--executor", default=ONE_AT_A_TIME, choices=sorted(EXECUTORS))
    parser.add_argument("--workers", type=int, default=2, help="of a pool, and to test a fleet")
    parser.add_argument("--at-once", type=int, default=16, help="runs of a fleet")
    parser.add_argument("--page", action="store_true", help="only write the pages")
    parser.add_argument("--runs", action="store_true", help="write no page")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; there are {', '.join(NAMES)}")
    if args.data is None:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    prepare_process()
    if not args.page:
        run(args)
    if args.runs:
        return 0
    found = {name: section(experiment(name), args.data, get_executor("none")) for name in NAMES}
    methods = method_page(experiment(METHODS), found.pop(METHODS))
    (ROOT / "docs" / "methods.md").write_text(methods, encoding="utf-8")
    sections = [(experiment(name), one) for name, one in found.items()]
    study = study_page(sections, pictures=ROOT / "docs" / "images")
    (ROOT / "docs" / "study.md").write_text(study, encoding="utf-8")
    return 0


def run(args: argparse.Namespace) -> None:
    """Everything that is asked for and missing, until the time is over."""
    until = time.monotonic() + 60 * args.minutes
    executor = get_executor(args.executor)
    resources = Resources(workers=args.workers, at_once=args.at_once)

    def until_then(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
        for outcome in executor(cells, resources):
            if outcome.ran:
                said = outcome.failure or f"{outcome.result and outcome.result['dev_loss']:.4f}"
                print(f"{outcome.cell.name}: {said}", flush=True)  # noqa: T201 - for whoever waits
            yield outcome
            if outcome.ran and time.monotonic() > until:
                raise TimeoutError

    try:
        for name in args.names or NAMES:
            asked = chosen(experiment(name), only=args.only, tasks=args.tasks, ranks=args.ranks)
            for part in parts(asked) if args.executor == ONE_AT_A_TIME else [asked]:
                section(part, args.data, until_then, resources)
    except TimeoutError:
        print("The time is over; the same command goes on.")  # noqa: T201


def experiment(name: str) -> Experiment:
    """One of `NAMES`."""
    folder = HERE if name == METHODS else HERE / "study"
    return load_experiment(str(folder / f"{name}.yaml"))


def chosen(
    whole: Experiment,
    *,
    only: Sequence[str] | None,
    tasks: Sequence[str] | None,
    ranks: Sequence[int] | None,
) -> Experiment:
    """What is asked for of an experiment; None for all."""
    some = whole.only(only) if only else whole
    return replace(some, tasks=tuple(tasks or some.tasks), ranks=tuple(ranks or some.ranks))


def parts(whole: Experiment) -> Iterator[Experiment]:
    """What becomes a row or two of its tables, in their order."""
    for task in whole.tasks:
        for method in whole.methods:
            one = replace(whole.only([method]), tasks=(task,))
            if whole.kind == "sweep":
                yield from (replace(one, ranks=(rank,)) for rank in whole.ranks)
            else:
                yield one


def section(
    experiment: Experiment, data: Path, executor: Executor, resources: Resources | None = None
) -> Section:
    """All of an experiment on fair terms, as an executor gives it."""
    root = HERE / "results" / ("methods" if experiment.name == METHODS else "study")
    grid = make_grid(experiment, load_scale("small"), root=root, data=data)
    return carry_out_all(grid, "fair", lambda cells: executor(cells, resources or Resources()))


if __name__ == "__main__":
    sys.exit(main())
