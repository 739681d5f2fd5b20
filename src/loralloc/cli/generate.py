"""`loralloc generate`: what a run's model answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import console


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "generate",
        help="let a trained adapter answer a prompt",
        description="Generate with the adapter of a run folder.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--prompt", action="append", required=True, help="what to answer; may be given repeatedly"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default 64")
    parser.add_argument("--num_beams", type=int, default=1, help="1 is greedy (default)")
    parser.add_argument("--base", action="store_true", help="without the adapter, to compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one answer a prompt."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    for name in ("max_new_tokens", "num_beams"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` is {getattr(args, name)}; it must be at least 1.")
    from loralloc.evaluation.generation import generate
    from loralloc.runs.trained import load_trained

    with console().status("loading the model"):
        model, tokenizer = load_trained(args.folder, with_adapter=not args.base)
    answers = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
    )
    for answer in answers:
        console().print(answer, markup=False, highlight=False, emoji=False, soft_wrap=True)
    return 0
