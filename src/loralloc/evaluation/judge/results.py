"""What came of it all, as data: `judge.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralloc import __version__
from loralloc.allocation.files import write_text
from loralloc.evaluation.figure import Figure
from loralloc.evaluation.judge.contestants import Contestant
from loralloc.evaluation.judge.questions import Answers, Question
from loralloc.evaluation.judge.review import Comparison, Judge, PairResult, Review
from loralloc.evaluation.overlap import rouge_l

FILE_NAME = "judge.json"


def rouge_l_to(reference: Answers, answers: Answers, questions: Sequence[Question]) -> Figure:
    """ROUGE-L of answers against others to the same questions, every turn a text of its own.

    Both must answer every turn (`check_answers`).
    """
    return rouge_l(
        [text for question in questions for text in answers[question.number]],
        [[text] for question in questions for text in reference[question.number]],
    )


def save_results(
    folder: Path,
    *,
    questions: Sequence[Question],
    contestants: Sequence[Contestant],
    overlaps: Mapping[str, Figure],
    judge: Judge | None,
    pairs: Sequence[PairResult],
) -> Path:
    """Write `judge.json` into the folder.

    Args:
        folder: Made where it is not there.
        questions: The questions asked.
        contestants: Who answered them.
        overlaps: ROUGE-L against GPT-4's answers, by contestant.
        judge: Who compared the answers; None where nobody did.
        pairs: Its reviews.

    Returns:
        The file.
    """
    data = {
        "loralloc": __version__,
        "num_questions": len(questions),
        "contestants": [
            {
                "name": one.name,
                "answers": str(one.source),
                "rouge_l": asdict(overlaps[one.name]) if one.name in overlaps else None,
            }
            for one in contestants
        ],
        "judge": judge and judge.endpoint.as_data(),
        "pairs": [_pair_data(pair) for pair in pairs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    return path


def _pair_data(pair: PairResult) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "mean_scores": pair.mean_scores,
        "first_wins": pair.count("first"),
        "ties": pair.count("tie"),
        "second_wins": pair.count("second"),
        "num_judged": len(pair.judged),
        "num_missing": pair.num_missing,
        "num_without_reply": len(pair.without_reply),
        "num_changed_by_order": pair.num_changed_by_order,
        "mean_gain_of_place": pair.mean_gain_of_place,
        "comparisons": [_comparison_data(comparison) for comparison in pair.comparisons],
    }


def _comparison_data(comparison: Comparison) -> dict[str, Any]:
    return {
        "question_id": comparison.question.number,
        "category": comparison.question.category,
        "scores": comparison.scores,
        "verdict": comparison.verdict,
        "first_shown_first": _review_data(comparison.first_shown_first),
        "second_shown_first": _review_data(comparison.second_shown_first),
    }


def _review_data(review: Review) -> dict[str, Any]:
    return {"scores": review.scores, "missing": review.missing, "review": review.text}
