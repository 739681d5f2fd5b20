"""`loralloc report`: one page on several runs, and its figures and tables as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console, counted

FORMATS = ("html", "png", "svg", "markdown", "latex")

DESCRIPTION = """\
Write one HTML page on runs that opens anywhere without a network: results, learning curves, where
ranks went round by round, churn, scores, cost, budgets. A folder of runs stands for all of them;
that of `loralloc reproduce` gives the tables of its experiments, too.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "report",
        help="write a page on runs, with figures and tables",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUNS", help="run folders, or folders of some"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="FOLDER", help="default: report"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=["html"],
        choices=FORMATS,
        metavar="FORM",
        help="the page (default), every figure as PNG or SVG, every table as Markdown or LaTeX",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the runs and write the files."""
    from loralloc.report.experiments import experiment_tables
    from loralloc.report.folders import read_runs
    from loralloc.report.page import report_on, write

    out = Console()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; `--out` names a folder.")
    runs = read_runs(args.folders)
    report = report_on(runs, experiments=experiment_tables(args.folders))
    with out.status("drawing"):
        written = write(report, args.out, formats=args.format)
    files = counted(len(written), "file")
    out.print(f"{files} on {counted(len(runs), 'run')}:", highlight=False)
    for path in written:
        out.print(path, markup=False, highlight=False, soft_wrap=True)
    return 0
