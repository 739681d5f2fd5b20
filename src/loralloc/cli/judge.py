"""`loralloc judge`: MT-Bench answers, compared in pairs by a model."""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.cli.console import Console
from loralloc.cli.help_text import HelpText

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.progress import Progress

    from loralloc.evaluation.figure import Figure
    from loralloc.evaluation.judge.contestants import Contestant
    from loralloc.evaluation.judge.questions import Question
    from loralloc.evaluation.judge.review import Judge, PairResult

DESCRIPTION = """\
Let runs answer the questions of MT-Bench, two turns each, and a model compare the answers in pairs:
every question in both orders, scores out of 10 averaged over the orders. Where the data folder has
gpt4_answers.jsonl, ROUGE-L against GPT-4's answers is told too; without --base_url and --model,
nothing else. Answers and replies are kept: the same command again goes on where it was interrupted.

The judge's key is read from the environment variable OPENAI_API_KEY; a server of your own needs
none.
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "judge",
        help="compare the MT-Bench answers of runs",
        description=DESCRIPTION,
        formatter_class=HelpText,
    )
    parser.add_argument(
        "contestants",
        nargs="+",
        metavar="RUN",
        help="a run folder, a model (folder or name), or a file of answers (.jsonl)",
    )
    parser.add_argument("--data", required=True, help="folder with the questions, test.jsonl")
    parser.add_argument("--base_url", metavar="URL", help="the judge's address, up to /v1")
    parser.add_argument("--model", metavar="NAME", help="the judge's name there")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/judge"),
        metavar="DIR",
        help="for judge.json and the judge's replies (runs/judge)",
    )
    answers = parser.add_argument_group("how runs answer")
    answers.add_argument("--num_beams", type=int, default=5, help="1 is greedy (default 5)")
    answers.add_argument("--max_new_tokens", type=int, default=1024, help="a turn (default 1024)")
    answers.add_argument("--batch_size", type=int, default=8, help="questions at once (default 8)")
    answers.add_argument(
        "--trust_remote_code", action="store_true", help="let code that comes with a model run"
    )
    answers.add_argument(
        "--prompt",
        choices=("chat", "alpaca"),
        help=(
            "the model's chat template or Alpaca's prompt (default: alpaca for runs of that task "
            "and models without a template, else chat)"
        ),
    )
    judge = parser.add_argument_group("how the judge replies")
    judge.add_argument("--temperature", type=float, default=0.0, help="default 0")
    judge.add_argument("--max_tokens", type=int, default=1024, help="a reply (default 1024)")
    judge.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for a whole reply (default 120)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer, compare, and print the tables."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    out = Console()
    from loralloc.evaluation.judge.contestants import contestant_names
    from loralloc.evaluation.judge.questions import (
        GPT4_ANSWERS_NAME,
        check_answers,
        load_questions,
        read_answers,
    )
    from loralloc.evaluation.judge.results import rouge_l_to, save_results

    names = contestant_names(args.contestants)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`--limit` is {args.limit}; it must be at least 1.")
    judge = _judge(args, out)
    questions = load_questions(args.data, limit=args.limit)
    gpt4 = Path(args.data) / GPT4_ANSWERS_NAME
    reference = read_answers(gpt4) if gpt4.is_file() else None
    if reference:
        check_answers(reference, questions, source=str(gpt4))
    contestants = _contestants(args, names, questions, out)
    overlaps = {
        one.name: rouge_l_to(reference, one.answers, questions)
        for one in contestants
        if reference and one.source.resolve() != gpt4.resolve()
    }
    pairs = _pairs(judge, contestants, questions, out) if judge else []
    path = save_results(
        args.output_dir,
        questions=questions,
        contestants=contestants,
        overlaps=overlaps,
        judge=judge,
        pairs=pairs,
    )
    if overlaps:
        out.print(_overlap_table(overlaps))
    if judge:
        for pair in pairs:
            out.print(_pair_table(pair, judge=judge.endpoint.model))
        out.print(f"replies: {judge.num_asked} asked for, {judge.num_cached} kept from before")
    out.print(f"results: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _judge(args: argparse.Namespace, out: Console) -> Judge | None:
    """Who compares; None where only answers and ROUGE-L are asked for."""
    if (args.base_url is None) != (args.model is None):
        given, other = ("--base_url", "--model") if args.base_url else ("--model", "--base_url")
        raise ValueError(f"`{given}` is given without `{other}`; a judge needs both.")
    if args.base_url is None:
        return None
    if len(args.contestants) < 2:
        raise ValueError(
            f"A judge compares two and only {args.contestants[0]} is given; name another run or a "
            "file of answers, or leave out `--base_url` and `--model`."
        )
    import openai  # noqa: F401 - where it is missing, that is told before anything is answered

    from loralloc.evaluation.judge.endpoint import Endpoint
    from loralloc.evaluation.judge.replies import ReplyCache
    from loralloc.evaluation.judge.review import Judge

    endpoint = Endpoint(
        args.base_url,
        model=args.model,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        timeout_s=args.timeout,
        on_wait=lambda what: out.print(what, style="yellow", markup=False, highlight=False),
    )
    return Judge(endpoint, ReplyCache(args.output_dir / "replies"))


def _contestants(
    args: argparse.Namespace, names: list[str], questions: list[Question], out: Console
) -> list[Contestant]:
    from loralloc.evaluation.judge.answers import Answering
    from loralloc.evaluation.judge.contestants import contestant

    decoding = Answering(
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        form=args.prompt,
    )
    found = {}
    with _bar(out) as bar:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        # Files first: a bad one is told before a model answers for hours.
        named = zip(args.contestants, names, strict=True)
        for given, name in sorted(named, key=lambda pair: not Path(pair[0]).is_file()):
            bar.reset(task, description=f"answers of {name}", total=None)
            found[name] = contestant(
                given,
                questions,
                name=name,
                decoding=decoding,
                output_dir=args.output_dir,
                trust_remote_code=args.trust_remote_code,
                on_batch=show,
            )
    return [found[name] for name in names]


def _pairs(
    judge: Judge, contestants: list[Contestant], questions: list[Question], out: Console
) -> list[PairResult]:
    pairs = []
    with _bar(out) as bar:
        task = bar.add_task("")
        for first, second in combinations(contestants, 2):
            description = f"{first.name} against {second.name}"
            bar.reset(task, description=description, total=len(questions))
            pairs.append(
                judge.compare(first, second, questions, on_question=lambda: bar.advance(task))
            )
    return pairs


def _bar(out: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("questions"),
        console=out,
        transient=True,
        disable=not out.is_terminal,  # a log file shows no bar
    )


def _overlap_table(overlaps: dict[str, Figure]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    (implementation,) = {figure.implementation for figure in overlaps.values()}
    table = Table(box=None, pad_edge=False)
    table.add_column("answers of", overflow="fold")
    table.add_column("ROUGE-L", justify="right")
    for name, figure in overlaps.items():
        table.add_row(Text(name), _shown(figure.value, ".1f"))
    return Group(
        Text("Likeness to GPT-4's answers, of 100", style="bold"),
        table,
        Text(implementation, style="dim"),
        "",
    )


def _pair_table(pair: PairResult, *, judge: str) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("contestant", overflow="fold")
    for heading in ("score", "won", "tied", "lost"):
        table.add_column(heading, justify="right")
    first, tied, second = (pair.count(verdict) for verdict in ("first", "tie", "second"))
    scores = pair.mean_scores or (None, None)
    for name, score, won, lost in (
        (pair.first, scores[0], first, second),
        (pair.second, scores[1], second, first),
    ):
        table.add_row(Text(name), _shown(score, ".2f"), str(won), str(tied), str(lost))
    num_judged, missing = len(pair.judged), f"{pair.num_missing} missing"
    if pair.num_missing:
        missing += " (no reply, no scores in it, or cut off)"
    lines: list[RenderableType] = [
        Text(f"Scores out of 10, mean of both orders, by {judge}", style="bold"),
        table,
        Text.assemble(f"{num_judged} judged, ", (missing, "yellow" if pair.num_missing else "")),
    ]
    if pair.without_reply:
        lines.append(
            Text(
                f"no reply to {len(pair.without_reply)} requests, which the same command makes "
                f"again; the first: {pair.without_reply[0].missing}",
                "yellow",
            )
        )
    if pair.mean_gain_of_place is not None:
        changed = f"order alone changes {pair.num_changed_by_order} of {num_judged} verdicts"
        gain = f"being shown first is worth {pair.mean_gain_of_place:+.2f} points"
        lines.append(Text(f"{changed}; {gain}"))
    return Group(*lines, "")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
