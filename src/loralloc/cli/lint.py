"""`loralloc lint`: which servers would load an adapter wrongly."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console

EXIT_FOUND = 1


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from loralloc.cli.export import add_model_options

    parser = verbs.add_parser(
        "lint",
        help="say which servers would load an adapter wrongly, and why",
        description=(
            "Read an adapter folder of PEFT's as PEFT, vLLM, SGLang, TGI, LoRAX, TensorRT-LLM, "
            "llama.cpp and diffusers do, and say which of them would refuse it or compute "
            "something else. Exits with 1 where one would, with 0 where none would."
        ),
    )
    parser.add_argument("folder", type=Path, metavar="ADAPTER", help="a run or adapter folder")
    parser.add_argument(
        "--for",
        dest="consumers",
        action="append",
        default=[],
        metavar="NAME",
        help="ask this one only, such as vLLM; may be given repeatedly",
    )
    parser.add_argument(
        "--fix",
        choices=("portable",),
        help="where something is found, write the portable form too, and say what is left",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="where to (default: ADAPTER-portable); with --fix"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Say what is found; 1 where anything is, or is left."""
    from loralloc.adapters.folder import read_adapter
    from loralloc.adapters.lint import CONSUMERS, lint

    for option, given in (
        ("output_dir", args.output_dir),
        ("base", args.base),
        ("trust_remote_code", args.trust_remote_code),
    ):
        if given and not args.fix:
            raise ValueError(f"`--{option}` is for what `--fix` writes; add it or leave this out.")
    out = Console()

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    adapter = read_adapter(args.folder)
    found = lint(adapter, only=args.consumers)
    for finding in found:
        say(f"{finding.consumer} {finding.reason}.")
    if not found:
        named = ", ".join(args.consumers or CONSUMERS)
        say(f"{args.folder}: nothing found for {named}.")
        return 0
    if not args.fix:
        if adapter.is_more_than_lora:
            say(f"`loralloc export {args.folder} --to merged` writes a model without an adapter.")
        else:
            say(f"`loralloc lint {args.folder} --fix portable` writes a form that they load right.")
        return EXIT_FOUND
    from loralloc.cli.progress import prepare_process

    prepare_process()
    from loralloc.runs.exporting import export

    with out.status("writing and checking"):
        done = export(
            args.folder,
            to=args.fix,
            output=args.output_dir,
            base=args.base,
            trust_remote_code=args.trust_remote_code,
        )
    left = lint(read_adapter(done.path), only=args.consumers)
    say(f"{done.path}: {'nothing found' if not left else 'left there'}.")
    for finding in left:
        say(f"  {finding.consumer} {finding.reason}.")
    return EXIT_FOUND if left else 0
