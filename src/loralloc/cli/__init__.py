"""The command `loralloc`: one file per verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from loralloc import __version__
from loralloc.cli import (
    completion,
    demo,
    env,
    eval,
    export,
    generate,
    judge,
    lint,
    methods,
    predict,
    preview,
    ranks,
    report,
    reproduce,
    resize,
    search,
    sweep,
    tasks,
    train,
)
from loralloc.cli.console import visible
from loralloc.runs.machine import let_idle_threads_sleep

VERBS = (
    *(demo, tasks, methods, preview, train, sweep, search, ranks, report),
    *(generate, eval, predict, export, lint, resize, judge, reproduce, env, completion),
)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

USER_ERRORS = (
    *(ValueError, TypeError, OSError, RuntimeError, ArithmeticError),
    *(ImportError, MemoryError, SafetensorError),  # a package, a machine or a disk lacks something
)
"""What is told in one sentence; anything else is our own bug and shows its traceback."""


EXTRAS = {"matplotlib": "report", "openai": "judge", "ray": "ray"}
"""Packages that a plain installation does not bring, and the extra that does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, 1 where `lint` finds something, 2 for bad input (one sentence on the error stream), 130
        when interrupted.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run") and not rest:
        parser.print_help()
        return 0
    if rest and not getattr(args, "takes_more_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    args.wait_policy = let_idle_threads_sleep()
    # Nothing here may wait for a network that is not asked for.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        sys.stderr.write("\nloralloc: interrupted\n")
        return EXIT_INTERRUPTED
    except USER_ERRORS as error:
        if args.debug:
            raise
        sentence = " ".join(str(error).split()) or type(error).__name__
        sentence = visible(sentence)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            sentence += f'; install it with `pip install "loralloc[{EXTRAS[error.name]}]"`.'
        sys.stderr.write(f"loralloc: error: {sentence}\n")
        return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loralloc",
        description="Fine-tune with LoRA whose ranks move between modules while it trains (ALoRA).",
        epilog="`loralloc VERB --help` explains a verb. Begin with `loralloc demo`.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"loralloc {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser
