"""The metrics of the tasks by name: over a test set, and for one example.

Values go from 0 to 100 throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

from loralloc.evaluation.answers import accuracy, answer_em, answer_f1, f1_em, label_score
from loralloc.evaluation.figure import Figure, check_pairs
from loralloc.evaluation.overlap import (
    bleu,
    meteor,
    meteor_score,
    rouge_l,
    rouge_l_score,
    sentence_bleu,
)
from loralloc.evaluation.wordnet import load_wordnet
from loralloc.tasks.task import Example, Metric

__all__ = ["Figure", "accuracy", "bleu", "f1_em", "measure", "meteor", "rouge_l", "score_example"]

PACKAGES: dict[Metric, tuple[str, ...]] = {
    "bleu": ("sacrebleu",),
    "rouge-l": ("rouge_score",),
    "meteor": ("nltk", "sacrebleu"),
}
"""What measures them, which the extra `metrics` brings."""

_JUDGE = "The metric judge needs a model that reviews answers: run `loralloc judge`."


def check_packages(metrics: Iterable[Metric]) -> None:
    """Find what metrics are measured with, before there is anything to measure.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """
    for package in dict.fromkeys(name for metric in metrics for name in PACKAGES.get(metric, ())):
        import_module(package)


def measure(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    examples: Sequence[Example],
    *,
    labels: Sequence[str],
) -> list[Figure]:
    """Measure predictions by every metric of their task.

    Args:
        metrics: The task's metrics.
        predictions: One text an example; for a classifier, the response of the label it chose.
        examples: What they are compared with. Where several rows share a prompt, give
            `tasks.columns.merge_references` of them.
        labels: The task's labels; empty for a task that generates text.

    Returns:
        The figures of each metric in turn, the one that names the metric first: accuracy and the
        share of answers that are no label; f1-em, F1 and EM; BLEU; ROUGE-L; METEOR, whose value
        is None where WordNet is not at hand.

    Raises:
        ValueError: If there are no predictions, not one an example, an example has nothing to
            compare with, accuracy is asked for without labels, or a metric is "judge".
    """
    return [
        figure
        for metric in metrics
        for figure in _figures(metric, predictions, examples, labels=labels)
    ]


def score_example(metric: Metric, prediction: str, example: Example) -> float | None:
    """Score one prediction, from 0 to 100.

    The mean over a test set is the metric's first figure, except for BLEU, which is not a mean:
    here it is sacrebleu's sentence BLEU.

    Returns:
        The score; None for METEOR where WordNet is not at hand.

    Raises:
        ValueError: If the example has nothing to compare with, or the metric is "judge".
    """
    if metric == "accuracy":
        return label_score(prediction, example.response)
    if metric == "judge":
        raise ValueError(_JUDGE)
    references = example.references
    check_pairs(metric, [prediction], [references])
    match metric:
        case "f1-em":
            return (answer_f1(prediction, references) + answer_em(prediction, references)) / 2
        case "bleu":
            return sentence_bleu(prediction, references)
        case "rouge-l":
            return rouge_l_score(prediction, references)
        case "meteor":
            try:
                wordnet = load_wordnet()
            except FileNotFoundError:  # `measure` says so
                return None
            return meteor_score(prediction, references, wordnet=wordnet)


def _figures(
    metric: Metric,
    predictions: Sequence[str],
    examples: Sequence[Example],
    *,
    labels: Sequence[str],
) -> list[Figure]:
    references = [example.references for example in examples]
    match metric:
        case "accuracy":
            responses = [example.response for example in examples]
            return accuracy(predictions, responses, labels=labels)
        case "f1-em":
            return f1_em(predictions, references)
        case "bleu":
            return [bleu(predictions, references)]
        case "rouge-l":
            return [rouge_l(predictions, references)]
        case "meteor":
            return [meteor(predictions, references)]
        case "judge":
            raise ValueError(_JUDGE)
