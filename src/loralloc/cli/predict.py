"""`loralloc predict`: a classifier's labels for rows that have none."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from loralloc.cli.console import Console, counted, visible
from loralloc.cli.help_text import HelpText

DESCRIPTION = """\
Give every row of a file the label of a run's classifier and the probability of each label. The
text is in the columns that the run was trained on; labels are not needed. The result is CSV: the
file's own columns, `predicted`, and `p(LABEL)` for each label.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "predict",
        help="label the rows of a file with a classifier",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("data", type=Path, metavar="FILE", help=".csv, .json, .jsonl or .parquet")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="default: print to the standard output"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="most at once (default 32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with the model run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict, and write the rows."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    if args.batch_size < 1:
        raise ValueError(f"`--batch_size` is {args.batch_size}; it must be at least 1.")
    if args.output and args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} is there already; name another, or give `--overwrite`.")
    if args.output and not args.output.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {args.output.parent} for `--output`; make it first.")
    from loralloc.allocation.files import write_text
    from loralloc.evaluation.classified import classify, write_csv

    told = Console(stderr=True)  # the standard output is for the rows
    with told.status("loading the model") as status:
        rows, labels = classify(
            args.folder,
            args.data,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
            on_batch=lambda done: status.update(f"{done:,} rows predicted"),
        )
    write_csv(written := io.StringIO(), rows, labels)
    if args.output is None:
        text = written.getvalue()
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        return 0
    write_text(args.output, written.getvalue())
    Console().print(f"{counted(len(rows), 'row')}: {args.output}", highlight=False, soft_wrap=True)
    return 0
