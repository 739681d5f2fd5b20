"""`loralloc reproduce`: a table or figure of the paper, or an experiment of one's own."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.cli.console import Console, counted, tables_that_fit
from loralloc.cli.help_text import HelpText

if TYPE_CHECKING:
    from loralloc.experiments.cell import Cell
    from loralloc.experiments.grid import Grid
    from loralloc.experiments.judging import JudgeAt
    from loralloc.experiments.reproduce import Planned, Report
    from loralloc.experiments.work import Outcome

DESCRIPTION = """\
Run a table or figure of the paper and print it beside what the paper printed: table1, table2,
table3, table4, table6, table7, table8, figure2, figure3, figure4, which are drawn as well; or an
experiment of your own, from a YAML file. A run that is finished is not run again and one that was
cut short goes on, so the same command after an interruption gives the table that it would have
given.

scales:
  paper   the paper's protocol and backbone, five seeds
  small   300 steps of a small backbone, three seeds, on searched learning rates
  smoke   16 steps of a tiny random backbone: whether everything works; figures mean nothing

terms:
  paper   the paper's one learning rate and, at its scale, its own sizes
  fair    for every method a learning rate searched with equally many runs on development loss, one
          budget of parameters, and LoRA at half, twice and four times the rank beside it
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "reproduce",
        help="run a table or figure of the paper",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument("experiment", metavar="NAME", help="a table, a figure, or a YAML file")
    parser.add_argument(
        "--scale", choices=("paper", "small", "smoke"), default="paper", help="default paper"
    )
    parser.add_argument("--terms", choices=("paper", "fair", "both"), help="default: by the scale")
    parser.add_argument(
        "--backbone", metavar="MODEL", help="a folder or name (default: the experiment's own)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with one folder a data set (default: the Hub; made-up rows for smoke)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="some of the experiment's methods"
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="default: runs/reproduce/SCALE"
    )
    parser.add_argument("--plan", action="store_true", help="show cells and hours, run nothing")
    who = parser.add_argument_group("who runs it")
    who.add_argument(
        "--executor",
        default="process",
        metavar="NAME",
        help=(
            "process (this one), fleet (this one, like runs at once), pool (several on this "
            "machine), ray, or none, which tells what is finished (default process)"
        ),
    )
    who.add_argument("--workers", type=int, default=2, metavar="N", help="of a pool (default 2)")
    who.add_argument(
        "--at_once", type=int, default=16, metavar="N", help="most runs of a fleet (default 16)"
    )
    who.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster")
    who.add_argument("--cpus_per_cell", type=float, default=1, metavar="N", help="of ray")
    who.add_argument("--gpus_per_cell", type=float, default=0, metavar="N", help="of ray")
    who.add_argument(
        "--retries", type=int, default=3, metavar="N", help="for a process or node that is lost"
    )
    judge = parser.add_argument_group("who judges (table3)")
    judge.add_argument("--judge_url", metavar="URL", help="the judge's address, up to /v1")
    judge.add_argument("--judge_model", metavar="NAME", help="the judge's name there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run, or plan, and print the tables."""
    from loralloc.runs.quiet import prepare_process

    prepare_process()
    import matplotlib  # noqa: F401 - where it is missing, that is told before anything is trained

    from loralloc.evaluation.metrics import PACKAGES, check_packages

    check_packages(PACKAGES)

    from loralloc.experiments.executors.executor import Resources, get_executor
    from loralloc.experiments.experiment import load_experiment, load_scale
    from loralloc.experiments.grid import make_grid
    from loralloc.experiments.reproduce import plan, reproduce
    from loralloc.report.experiment_figures import draw

    out = Console()
    experiment, scale = load_experiment(args.experiment), load_scale(args.scale)
    if args.only:
        experiment = experiment.only(args.only)
    executor, judge = get_executor(args.executor), _judge(args)
    resources = Resources(
        workers=args.workers,
        at_once=args.at_once,
        cpus_per_cell=args.cpus_per_cell,
        gpus_per_cell=args.gpus_per_cell,
        address=args.address,
        retries=args.retries,
    )
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"`--seeds` is {args.seeds}; it must be at least 1.")
    with out.status("looking at backbone and data"):
        grid = make_grid(
            experiment,
            scale,
            root=args.output_dir or Path("runs") / "reproduce" / args.scale,
            backbone=args.backbone,
            data=args.data,
            seeds=tuple(range(args.seeds)) if args.seeds else None,
        )
        terms = {None: scale.terms, "both": ("paper", "fair")}.get(args.terms, (args.terms,))
        planned = plan(grid, terms)
    if args.plan:
        for one in planned:
            done = "finished" if one.is_finished else f"{_duration(one.seconds)}"
            out.print(f"{one.cell.name}: {done}", highlight=False, soft_wrap=True)
    _introduce(out, grid, planned)
    if args.plan:
        return 0
    with _shown(out, planned) as progress:
        report = reproduce(
            grid,
            terms,
            executor=executor,
            resources=resources,
            judge=judge,
            on_cells=progress.add,
            on_outcome=progress.show,
        )
    with out.status("drawing"):
        drawn = draw(report)
    _print(out, report, drawn)
    return 0


def _judge(args: argparse.Namespace) -> JudgeAt | None:
    from loralloc.experiments.judging import JudgeAt

    if (args.judge_url is None) != (args.judge_model is None):
        given, other = "--judge_url", "--judge_model"
        if args.judge_url is None:
            given, other = other, given
        raise ValueError(f"`{given}` is given without `{other}`; a judge needs both.")
    return JudgeAt(base_url=args.judge_url, model=args.judge_model) if args.judge_url else None


def _introduce(out: Console, grid: Grid, planned: Sequence[Planned]) -> None:
    left = [one for one in planned if not one.is_finished]
    seconds = sum(one.seconds for one in left)
    name = Path(grid.backbone).name
    budgets = ", ".join(f"{number:,} (r={rank})" for rank, number in grid.budgets.items())
    out.print(
        f"{grid.experiment.name} on {name}: {counted(len(planned), 'cell')}, "
        f"{len(planned) - len(left)} finished, "
        f"about {_duration(seconds)} of one device for the rest",
        highlight=False,
    )
    out.print(f"budgets in parameters: {budgets}", highlight=False)


class Progress:
    """The whole grid as one bar, and a line for what fails."""

    def __init__(self, out: Console, planned: Sequence[Planned]) -> None:
        """Begin with what is planned."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._out = out
        self._guess = {one.cell.folder: one.seconds for one in planned}
        self._left: Counter[Path] = Counter()
        self._took, self._guessed, self._begin = 0.0, 0.0, 0.0
        guesses = list(self._guess.values())
        self._usual = sum(guesses) / max(1, len(guesses))  # of a cell that was not planned
        self.bar = Bar(
            TextColumn("cells"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._task = self.bar.add_task("", total=0, left="")

    def add(self, cells: Sequence[Cell]) -> None:
        """More cells are to be carried out."""
        import time

        self._begin = self._begin or time.perf_counter()
        self._left.update(cell.folder for cell in cells)
        total = (self.bar.tasks[0].total or 0) + len(cells)
        self.bar.update(self._task, total=total)

    def show(self, outcome: Outcome) -> None:
        """A cell is over."""
        import time

        folder = outcome.cell.folder
        self._left -= Counter([folder])
        if outcome.ran:
            self._guessed += self._guess.get(folder, self._usual)
            self._took = time.perf_counter() - self._begin
        # What was guessed, corrected by what the cells so far have taken.
        ratio = self._took / self._guessed if self._guessed else 1.0
        left = sum(self._guess.get(one, self._usual) * n for one, n in self._left.items()) * ratio
        self.bar.update(self._task, advance=1, left=f"about {_duration(left)} left")
        if outcome.failure:
            self._out.print(
                f"failed {outcome.cell.name}: {outcome.failure}", style="red", highlight=False
            )
        elif not self._out.is_terminal and outcome.ran:  # a log file shows no bar
            self._out.print(
                f"{outcome.cell.name}; about {_duration(left)} left",
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def _shown(out: Console, planned: Sequence[Planned]) -> Iterator[Progress]:
    progress = Progress(out, planned)
    with progress.bar:
        yield progress


def _print(out: Console, report: Report, drawn: Sequence[Path]) -> None:
    for table in report.tables:
        for part in tables_that_fit(table.title, table.columns, table.rows, width=out.width):
            out.print(part)
        for note in table.notes:
            out.print(note, style="dim", highlight=False, markup=False)
        out.print()
    for remark in report.remarks:
        out.print(remark, style="yellow", highlight=False, markup=False, soft_wrap=True)
    names = ", ".join(["report.md", "report.tex", "report.json", *(path.name for path in drawn)])
    out.print(
        f"report: {report.folder} ({names})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
