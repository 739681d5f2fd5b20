"""`loralloc search`: which ranks to use, from short runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

STEPS = 200
EPILOG = """\
All flags of `loralloc train` are taken (data, model, batch, learning rate, lora_r, ...). Written
into the folder: peft.json and axolotl.yaml with a rank for every module; llama_factory.yaml and
trl.txt, which have one rank for all, with its modules and its mean rank; search.json with all
numbers."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "search",
        help="find out which ranks a model needs for some data",
        description=(
            "Shrink LoRA in a short run, and print the smallest pattern of ranks whose held-out "
            "loss is not worse, and what doubling r would buy."
        ),
        epilog=EPILOG,
        formatter_class=HelpText,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings; flags win over them")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"steps of each run ({STEPS})"
    )
    parser.add_argument(
        "--no-doubling",
        action="store_true",
        help="leave out the two runs that say what doubling r would buy",
    )
    parser.set_defaults(run=run, takes_more_flags=True)


def run(args: argparse.Namespace) -> int:
    """Search, print the answer, write it."""
    from loralloc.cli.progress import Progress, prepare_process

    prepare_process()
    from loralloc.allocation.shrinking import in_words
    from loralloc.runs.folder import SETTINGS
    from loralloc.runs.run import Run
    from loralloc.runs.search import ANSWER, FILES, search
    from loralloc.runs.settings import resolve

    if args.steps < 2:
        raise ValueError(f"`--steps` is {args.steps}; it must be at least 2.")
    if any(word.split("=")[0].replace("-", "_") == "__max_steps" for word in args.rest):
        raise ValueError(
            "`--max_steps` is the length of the run that the ranks are for, and each run of a "
            "search takes `--steps`; give that."
        )
    settings = resolve(args.rest, config=args.config)
    folder = settings.output_dir
    taken = [name for name in (*FILES, ANSWER, SETTINGS) if (folder / name).exists()]
    if taken:
        raise ValueError(
            f"{folder} holds a {taken[0]} already; name another `--output_dir`, or remove it."
        )
    progress = Progress(Console())

    def introduce(prepared: Run) -> None:
        progress.introduce(prepared)
        progress.take_over(prepared.trainer)

    with progress.shown():
        answer = search(
            settings,
            num_steps=args.steps,
            doubles=not args.no_doubling,
            on_run=introduce,
            on_round=progress.show_round,
            on_shrunk=lambda found: found.save(folder),  # whatever becomes of the other runs
        )
    answer.save(folder)
    out = Console()
    out.print(f"\n{in_words(answer.record)}", highlight=False)
    if answer.doubling:
        out.print(answer.doubling.in_words(), highlight=False)
    ranks, many = answer.pattern.ranks, len(answer.record.initial_ranks)
    out.print(f"{sum(ranks.values()):,} ranks in {len(ranks)} of {many} modules:", highlight=False)
    for name in FILES:
        out.print(f"  {folder / name}", highlight=False, markup=False, soft_wrap=True)
    return 0
