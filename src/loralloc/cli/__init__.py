"""The command `loralloc`: one file per verb."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

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
from loralloc.cli.help_text import HelpText
from loralloc.runs import launched
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


EXTRAS = {
    **dict.fromkeys(("matplotlib", "jinja2", "markupsafe", "scipy"), "report"),
    **dict.fromkeys(("nltk", "rouge_score", "sacrebleu"), "metrics"),
    "openai": "judge",
    "ray": "ray",
}
"""Packages that a plain installation does not bring, and the extra that does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, 1 where `lint` finds something, 2 for bad input (one sentence on the error stream, of one
        process where there are several), 130 when interrupted.
    """
    with nullcontext() if launched.is_main() else _silence():
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        if not hasattr(args, "run") and not rest:
            parser.print_help()
            return 0
        if rest and not getattr(args, "takes_more_flags", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    if launched.count() > 1:  # PyTorch's own voice, of sockets and of gradients it looks for
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Wherever it is installed PEFT imports it, and it complains of a package that it could use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    args.wait_policy = let_idle_threads_sleep()
    # Nothing here may wait for a network that is not asked for.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        _check_processes(args)
        return int(args.run(args))
    except KeyboardInterrupt:
        if launched.is_first_to_fail():
            sys.stderr.write("\nloralloc: interrupted\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        is_first = launched.is_first_to_fail()  # whose words these are, and not the others'
        # What is written in Rust, as tokenizers, raises the bare class on a full disk.
        is_told = isinstance(error, USER_ERRORS) or type(error) is Exception
        if is_told and not is_first:
            return EXIT_BAD_INPUT
        if args.debug or not is_told:
            raise
        sentence = _in_words(error)
        if launched.is_left_alone(error):
            sentence = launched.LEFT_ALONE
        sentence = visible(sentence)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            sentence += f'; install it with `pip install "loralloc[{EXTRAS[error.name]}]"`.'
        sys.stderr.write(f"loralloc: error: {sentence}\n")
        return EXIT_BAD_INPUT


def _in_words(error: Exception) -> str:
    """An error in one line; the system's without its number."""
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(words.split()) or type(error).__name__


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is said inside: another process says it."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _check_processes(args: argparse.Namespace) -> None:
    """Refuse a launcher of several processes for a verb that each of them would do alone.

    Raises:
        ValueError: Naming the verb.
    """
    if launched.count() > 1 and not getattr(args, "takes_processes", False):
        raise ValueError(
            f"`loralloc {args.verb}` runs in one process, and {launched.count()} were started, "
            "each of which would do the same; start it without torchrun or accelerate, which are "
            "for `loralloc train`."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loralloc",
        description="Fine-tune with LoRA whose ranks move between modules while it trains (ALoRA).",
        epilog="`loralloc VERB --help` explains a verb. Begin with `loralloc demo`.",
        formatter_class=HelpText,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"loralloc {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser
