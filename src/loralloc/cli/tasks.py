"""`loralloc tasks`: the data sets that a run can be trained and tested on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from loralloc.cli.console import Console

if TYPE_CHECKING:
    from loralloc.tasks.task import Task

SPLITS = ("train", "validation", "test")
NOTE = """
Sizes are of the Hub's sets divided as in the paper; a folder is used as it is.
The examples of a task: loralloc preview TASK --data FOLDER"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "tasks",
        help="list the data sets of the paper",
        description=(
            "List every task: its data set on the Hub, the sizes that the paper's split rule "
            "gives it, the heads that can learn it, its metrics and the licence of its rows."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from rich.table import Table
    from rich.text import Text

    from loralloc.tasks.catalog import TASKS, split_sizes

    if args.json:
        Console().print_json(data=[facts(task) for task in TASKS.values()])
        return 0
    table = Table(box=None, pad_edge=False)
    table.add_column("task", style="bold", no_wrap=True)
    table.add_column(Text.assemble("data set\n", ("licence", "dim")), overflow="fold")
    for name in ("train", "dev", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(Text.assemble("heads\n", ("metrics", "dim")))
    for task in TASKS.values():
        sizes = split_sizes(task)
        table.add_row(
            task.name,
            Text.assemble(data_set(task) or "-", "\n", (task.licence, "dim")),
            *(f"{sizes[name]:,}" if name in sizes else "-" for name in SPLITS),
            Text.assemble(", ".join(heads(task)), "\n", (", ".join(task.metrics) or "-", "dim")),
        )
    out = Console()
    out.print(table)
    out.print(NOTE, highlight=False, soft_wrap=True)
    return 0


def facts(task: Task) -> dict[str, object]:
    """What the table says of a task, as data."""
    from loralloc.tasks.catalog import split_sizes

    return {
        "task": task.name,
        "data_set": data_set(task),
        "sizes": split_sizes(task),
        "heads": heads(task),
        "metrics": list(task.metrics),
        "licence": task.licence,
    }


def data_set(task: Task) -> str | None:
    """Name the data set on the Hub, with its configuration where it has several."""
    return ", ".join(name for name in (task.hub_name, task.hub_config) if name) or None


def heads(task: Task) -> list[str]:
    """Name the heads that can learn a task: all responses can be generated, some chosen too."""
    from loralloc.tasks.task import has_spans

    if task.labels:
        return ["lm", "classification"]
    return ["lm", "span"] if has_spans(task) else ["lm"]
