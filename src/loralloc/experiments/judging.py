"""Letting a judge compare the answers of an experiment's runs with LoRA's, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.evaluation.judge.contestants import Contestant
from loralloc.evaluation.judge.endpoint import Endpoint
from loralloc.evaluation.judge.questions import Question, load_questions, read_answers
from loralloc.evaluation.judge.replies import ReplyCache
from loralloc.evaluation.judge.results import save_results
from loralloc.evaluation.judge.review import Judge, PairResult
from loralloc.experiments import scripted_judge
from loralloc.experiments.cell import Cell
from loralloc.experiments.collected import Entry, Section
from loralloc.experiments.experiment import BASELINE
from loralloc.experiments.tables import Table


@dataclass(frozen=True, kw_only=True)
class JudgeAt:
    """Where a judge is."""

    base_url: str
    """Its address, up to "/v1"."""

    model: str
    """Its name there."""


@contextmanager
def judge_or_scripted(judge: JudgeAt | None, *, scripted: bool) -> Iterator[JudgeAt | None]:
    """The judge that was named, or where `scripted` one that reads nothing."""
    if judge is not None or not scripted:
        yield judge
        return
    with scripted_judge.scripted_judge() as address:
        yield JudgeAt(base_url=address, model=scripted_judge.NAME)


def judged_tables(
    section: Section, judge: JudgeAt | None, *, questions: str, folder: Path, scripted: bool
) -> list[Table]:
    """Compare every method's answers with LoRA's, each seed with the same one, and tell the scores.

    Replies are kept in the folder: nothing is asked for twice.

    Args:
        section: Of runs that have answered.
        judge: Who compares; None for nobody, so that there is no table.
        questions: The folder of the questions.
        folder: For replies and `judge.json`.
        scripted: Whether the judge reads nothing.

    Raises:
        EndpointError: The endpoint gives no replies; those so far are kept.
    """
    if judge is None:
        return []
    asked = load_questions(questions)
    # A scripted judge has another address every time; its replies are not to be asked for again.
    one = Judge(Endpoint(judge.base_url, model=judge.model), ReplyCache(folder / "replies"))
    rows = []
    for entry in section.entries:
        lora = section.find(entry.task, BASELINE, entry.rank)
        if lora is None or entry is lora:
            continue
        pairs, contestants = _compared(one, entry, lora, asked)
        save_results(
            folder / section.terms / f"{entry.method}-r{entry.rank}",
            questions=asked,
            contestants=contestants,
            overlaps={},
            judge=one,
            pairs=pairs,
        )
        rows.append(_row(entry, pairs))
    notes = [
        f"{len(asked)} questions, each in both orders; scores out of 10, the mean over seeds, by "
        f"{judge.model}."
    ]
    if scripted:
        notes.append("The judge is scripted and reads nothing: these scores mean nothing.")
    columns = ["method", "score", "LoRA's beside it", "won", "tied", "lost", "missing"]
    return [Table(title="Scores by the judge", columns=columns, rows=rows, notes=notes)]


def _compared(
    judge: Judge, entry: Entry, lora: Entry, questions: Sequence[Question]
) -> tuple[list[PairResult], list[Contestant]]:
    pairs, contestants = [], []
    for seed in sorted(set(entry.results) & set(lora.results)):
        ours, theirs = (
            _contestant(of.results[seed], f"{of.method}, seed {seed}") for of in (entry, lora)
        )
        pairs.append(judge.compare(ours, theirs, questions))
        contestants += [ours, theirs]
    return pairs, contestants


def _contestant(result: Any, name: str) -> Contestant:
    path = Cell.from_data(result["cell"]).folder / result["test"]["answers"]
    return Contestant(name=name, source=path, answers=read_answers(path))


def _row(entry: Entry, pairs: Sequence[PairResult]) -> list[str]:
    scores = [pair.mean_scores for pair in pairs if pair.mean_scores is not None]
    means = (
        [f"{statistics.fmean(score[i] for score in scores):.2f}" for i in (0, 1)]
        if scores
        else ["-", "-"]
    )
    counts = [sum(pair.count(verdict) for pair in pairs) for verdict in ("first", "tie", "second")]
    missing = sum(pair.num_missing for pair in pairs)
    return [entry.method, *means, *map(str, counts), str(missing)]
