"""`loralloc generate`: what a run's model answers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

if TYPE_CHECKING:
    from loralloc.tasks.conversations import Prompt

DESCRIPTION = """\
Generate with the adapter of a run folder. A prompt is given to the model as its training data was:
to a run on conversations as what the user says, through the chat template and with the system
message that all of these began with; to any other run as it is.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "generate",
        help="let a trained adapter answer a prompt",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--prompt", action="append", required=True, help="what to answer; may be given repeatedly"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default 64")
    parser.add_argument("--num_beams", type=int, default=1, help="1 is greedy (default)")
    parser.add_argument(
        "--system", metavar="TEXT", help="another system message, to a run on conversations"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without a chat template"
    )
    parser.add_argument("--base", action="store_true", help="without the adapter, to compare")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with the model run"
    )
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

    prompts = _prompts(args)
    with Console().status("loading the model"):
        model, tokenizer = load_trained(
            args.folder,
            with_adapter=not args.base,
            trust_remote_code=args.trust_remote_code,
        )
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
    )
    for answer in answers:
        Console().print(answer, markup=False, highlight=False, emoji=False, soft_wrap=True)
    return 0


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts in the form of the run's training data."""
    from loralloc.runs.folder import saved_conversation

    conversation = saved_conversation(args.folder)
    if args.system is not None and (args.raw or not conversation):
        why = (
            "`--raw` sends prompts as they are"
            if args.raw
            else (f"the run in {args.folder} was not trained on conversations")
        )
        raise ValueError(f"`--system` is said in a conversation, and {why}; leave it out.")
    if args.raw or not conversation:
        return list(args.prompt)
    if args.system is not None:
        conversation = dataclasses.replace(conversation, system=args.system)
    return [conversation.ask(prompt) for prompt in args.prompt]
