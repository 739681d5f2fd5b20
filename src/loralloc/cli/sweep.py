"""`loralloc sweep`: which learning rate and which rank, with runs that are trained at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from loralloc.cli.console import Console, counted
from loralloc.cli.help_text import HelpText

if TYPE_CHECKING:
    from loralloc.experiments.cell import Cell
    from loralloc.experiments.sweep import Found

DESCRIPTION = """\
Search for the learning rate and the rank with the lowest development loss. Every combination of
the values given is trained with every seed; runs of one backbone are trained at once on it (a
fleet), so that on a GPU many of them take about the time of a few. Finished runs are not run again:
the same command after an interruption goes on, and one with more values trains only the new ones.
"""

EPILOG = """\
All flags of `loralloc train` are taken besides and hold for every run, such as

  loralloc sweep --task demo --learning_rate 5e-4,1e-3 --r 1,2,4,8 --seed 0,1,2

alpha / r is 2 at every rank, and rsLoRA's alpha 16, unless `--lora_alpha` is given. What a fleet
cannot take (see `docs/fleet.md`) is trained one by one. The folder then holds `best`, the run
folder of the best adapter; `sweep.json`, the table; and `cells`, every run.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "sweep",
        help="search for a learning rate and a rank, many runs at once",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpText,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--learning_rate",
        type=_several(float),
        metavar="LR,...",
        help="learning rates (default 5e-4,1e-3,2e-3,4e-3)",
        default=[5e-4, 1e-3, 2e-3, 4e-3],
    )
    parser.add_argument(
        *("--r", "--lora_r"), type=_several(int), metavar="R,...", help="ranks [8]", default=[8]
    )
    parser.add_argument(
        "--seed", type=_several(int), metavar="N,...", help="seeds [0]", default=[0]
    )
    parser.add_argument(
        "--method", type=_several(str), metavar="NAME,...", help="methods [lora]", default=["lora"]
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings; flags win over them")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="default: runs/sweep-DATA-MODEL"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be run, run nothing")
    parser.add_argument(
        "--executor",
        default="fleet",
        metavar="NAME",
        help="fleet (at once), process (one by one), pool (several processes) or ray [fleet]",
    )
    parser.add_argument(
        "--at_once", type=int, default=16, metavar="N", help="most runs of a fleet [16]"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of a pool [2]")
    parser.set_defaults(run=run, takes_more_flags=True)


def run(args: argparse.Namespace) -> int:
    """Train what is missing, and compare."""
    from loralloc.experiments import sweep
    from loralloc.experiments.executors.executor import Resources, get_executor
    from loralloc.runs.quiet import prepare_process

    prepare_process()
    options = _options(args)
    executor = get_executor(args.executor)
    resources = Resources(workers=args.workers, at_once=args.at_once)
    root = args.output_dir or Path("runs") / _folder_name(options)
    cells = sweep.cells(
        options,
        methods=args.method,
        ranks=args.r,
        learning_rates=args.learning_rate,
        seeds=args.seed,
        root=root,
    )
    _show_plan(cells, fleet_of=args.at_once if args.executor == "fleet" else None)
    if args.plan:
        return 0
    outcomes = []
    for number, outcome in enumerate(executor(cells, resources), 1):
        outcomes.append(outcome)
        said = f"failed: {outcome.failure}"
        if outcome.result:
            said = f"development loss {outcome.result['dev_loss']:.4f}"
        before = "" if outcome.ran else " (finished before)"
        _say(f"{number}/{len(cells)} {outcome.cell.name}: {said}{before}")
    found = sweep.find(outcomes)
    folder = sweep.keep(found, root)
    _show(found)
    _say(f"\nbest adapter: {folder}\ntable: {root / sweep.TABLE}")
    return 0


def _several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads values with commas between them."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"values with commas between them, each {kind.__name__}"
    return read


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of every run, with the absolute name of the data's folder or file."""
    from loralloc.runs.arguments import DEFAULTS
    from loralloc.runs.sources import read_flags, read_yaml

    options = {**(read_yaml(args.config) if args.config else {}), **read_flags(args.rest)}
    for name in ("learning_rate", "lora_r", "seed", "method", "output_dir"):
        options.pop(name, None)  # of a file; the flags are the sweep's own
    options.setdefault("model_name_or_path", DEFAULTS["model_name_or_path"])
    return options


def _folder_name(options: dict[str, Any]) -> str:
    data = options.get("task") or Path(str(options.get("dataset_name") or "data")).stem
    return f"sweep-{data}-{Path(str(options['model_name_or_path'])).name}"


def _show_plan(cells: Sequence[Cell], *, fleet_of: int | None) -> None:
    """How many runs there are, how many are finished, and what is trained at once."""
    from loralloc.experiments.work import finished

    left = [cell for cell in cells if finished(cell) is None]
    _say(f"{counted(len(cells), 'run')}, {len(cells) - len(left)} of them finished before")
    if fleet_of is None:
        return
    from loralloc.experiments.executors.fleet import groups

    for group in groups(left, at_once=fleet_of):
        if group.why_alone:
            _say(f"{len(group.cells)} one by one: {group.why_alone}")
        else:
            _say(f"{len(group.cells)} at once")


def _show(found: Found) -> None:
    """A table for each method: ranks by learning rates, the best in bold."""
    from rich.table import Table

    for method in dict.fromkeys(point.method for point in found.points):
        points = [point for point in found.points if point.method == method]
        rates = sorted({point.learning_rate for point in points})
        seeds = len(points[0].losses) + len(points[0].failures)
        of = "of one seed" if seeds == 1 else f"mean of {seeds} seeds and its standard error"
        _say(f"\n{method}: development loss by rank and learning rate, {of}")
        table = Table()
        table.add_column("r", justify="right")
        for rate in rates:
            table.add_column(f"{rate:g}", justify="right")
        for rank in sorted({point.rank for point in points}):
            row = {p.learning_rate: p for p in points if p.rank == rank}
            shown = [_value(row[rate], is_best=row[rate] is found.best) for rate in rates]
            table.add_row(str(rank), *shown)
        Console().print(table)
    best = found.best
    _say(f"best: {best.method} with --r {best.rank} --learning_rate {best.learning_rate:g}")
    if found.near:
        names = ", ".join(f"{p.method} r {p.rank} at {p.learning_rate:g}" for p in found.near)
        _say(f"within the noise of the seeds: {names}")
    for edge in found.edges:
        _say(edge)
    if not found.edges:
        _say("no edge of what was tried was hit")


def _value(point: Any, *, is_best: bool) -> Text:
    if not point.losses:
        return Text("failed")
    text = f"{point.mean:.4f}"
    if point.error is not None:
        text += f" ± {point.error:.4f}"
    if not point.is_whole:
        text += f" ({len(point.failures)} failed)"
    return Text(text, style="bold" if is_best else "")


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
