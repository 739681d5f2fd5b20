"""`loralloc resize`: a finished adapter with other ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

EPILOG = """\
With data, named by flags of `loralloc train` (--task, --dataset_name, --max_length, ...), the loss
on held-out examples is told before and after, and `--by scores` can measure AB-LoRA importance on
others. New ranks have a column of zeros in B, so that nothing changes until they are trained."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from loralloc.cli.export import add_model_options

    parser = verbs.add_parser(
        "resize",
        help="give a finished adapter fewer ranks, or more to train on with",
        description="Write the LoRA adapter of a run, or any of PEFT's, with other ranks.",
        epilog=EPILOG,
        formatter_class=HelpText,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="ADAPTER", help="a run or adapter folder")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="this rank for every module")
    size.add_argument(
        "--params", type=int, metavar="N", help="at most so many parameters, wherever they are"
    )
    size.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="the fewest ranks with this share of each module's squared singular values",
    )
    parser.add_argument(
        "--by",
        default="singular-values",
        metavar="WAY",
        help="what decides: singular-values (default), or scores, which costs more",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="a folder that is not there (default: ADAPTER-resized)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of examples and new ranks (default 0)")
    add_model_options(parser)
    parser.set_defaults(run=run, takes_more_flags=True, config=None)


def run(args: argparse.Namespace) -> int:
    """Resize, say what changed."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    from loralloc.runs.resizing import Target, resize_folder

    target = Target(rank=args.rank, params=args.params, energy=args.energy)
    out = Console()
    with out.status("resizing"):
        done = resize_folder(
            args.folder,
            target,
            data=args.rest,
            by=args.by,
            output=args.output_dir,
            base=args.base,
            trust_remote_code=args.trust_remote_code,
            seed=args.seed,
        )
    left = sum(rank > 0 for rank in done.after.values())
    lines = [
        f"{done.path}: {sum(done.before.values()):,} ranks in {len(done.before)} modules, now "
        f"{sum(done.after.values()):,} in {left}"
    ]
    if done.losses:
        before, after = done.losses
        lines.append(f"held-out loss {before:.4f} before, {after:.4f} after")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
