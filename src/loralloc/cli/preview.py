"""`loralloc preview`: what a model is shown of a data set, and what it has to say."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from loralloc.cli.console import Console, visible

if TYPE_CHECKING:
    from rich.text import Text

    from loralloc.tasks.task import Example, Task

SUPERVISED = "bold green"
MINOR = "dim"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "preview",
        help="show examples of a task as a model reads them",
        description=(
            "Show the first examples of a task: the prompt, and the response that the loss is on."
        ),
        epilog="`loralloc tasks` lists the tasks.",
    )
    parser.add_argument("task", metavar="TASK", help="the name of a task")
    parser.add_argument(
        "--data", metavar="DATA", help="a folder, a file or a Hub name (default: the task's own)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="the split to show (default: the first there is)",
    )
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="examples shown (3)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the examples."""
    from loralloc.tasks.catalog import get_task, load_task
    from loralloc.tasks.columns import to_examples

    if args.limit < 1:
        raise ValueError(f"`--limit` is {args.limit}; it must be at least 1.")
    task = get_task(args.task)
    splits = load_task(task, args.data)
    name = args.split or next(iter(splits))
    if name not in splits:
        raise ValueError(f"The data has no {name} split; it has {', '.join(splits)}.")
    split = splits[name]
    count = min(args.limit, len(split.dataset))
    shown = replace(split, dataset=split.dataset.select(range(count)))
    out = Console()
    for number, example in enumerate(to_examples(shown, task), start=1):
        place = f"{task.name}, {name} {number:,} of {len(split.dataset):,} ({split.source})"
        for line in _lines(example, task, place):
            out.print(line, soft_wrap=True)
    return 0


def _lines(example: Example, task: Task, place: str) -> list[Text]:
    """One example: where it is, what the model reads and writes, and what it is measured by."""
    from rich.text import Text

    parts = [("prompt", example.prompt, "")]
    parts += [("next turn", turn, "") for turn in example.turns[1:]]
    if example.response:
        parts.append(("response", example.response, SUPERVISED))
    if example.label is not None:
        names = ", ".join(map(repr, task.labels))
        parts.append(("label", f"index {example.label} of {names}", MINOR))
    others = [text for text in example.references if text != example.response]
    parts += [("reference", text, MINOR) for text in (*others, *example.turn_references)]
    if example.span:
        found = zip(example.span.answers, example.span.starts, strict=True)
        parts += [("span", f"{start:>5,} {answer}", MINOR) for answer, start in found]

    lines = [_text(place, MINOR)]
    for name, value, style in parts:
        for number, line in enumerate(value.split("\n")):
            margin = Text(f"{name if number == 0 else '':<11}", style=MINOR)
            lines.append(Text.assemble(margin, _text(line, style)))
    return [*lines, _text("")]


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(visible(value), style=style)
