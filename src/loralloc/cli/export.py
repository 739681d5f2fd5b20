"""`loralloc export`: an adapter in the form that a server loads right."""

from __future__ import annotations

import argparse
from pathlib import Path

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

DESCRIPTION = """\
Write the adapter of a run, or any LoRA adapter of PEFT's, in another form:

  peft      smallest; every module with its own rank, by patterns that only PEFT reads
  portable  scaling folded into B, one rank for all, no patterns: loads right everywhere
  merged    a whole model without an adapter
  gguf      a LoRA for llama.cpp
  mlx       an adapter for MLX-LM

What was written is opened again and its logits are compared with the run's before the folder gets
its name; where they differ nothing is left.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "export",
        help="write an adapter in the form that a server loads right",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument("folder", type=Path, metavar="ADAPTER", help="a run or adapter folder")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help="peft, portable, merged, gguf or mlx"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="a folder that is not there (default: ADAPTER-FORMAT)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument(
        "--rank-multiple",
        type=int,
        default=1,
        metavar="N",
        help="round the one rank of portable and mlx up to a multiple of N, such as 8 (default 1)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how an adapter's backbone is loaded."""
    parser.add_argument(
        "--base", metavar="MODEL", help="the model it is for (default: as the folder says)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with the model run"
    )


def run(args: argparse.Namespace) -> int:
    """Write, check, say how far off it is."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    from loralloc.runs.exporting import export

    with Console().status("writing and checking"):
        done = export(
            args.folder,
            to=args.to,
            output=args.output_dir,
            dtype=args.dtype,
            rank_multiple=args.rank_multiple,
            base=args.base,
            trust_remote_code=args.trust_remote_code,
        )
    Console().print(
        f"{done.path}: logits within {done.difference:.1g} of the adapter's "
        f"({done.allowed:.1g} allowed)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0
