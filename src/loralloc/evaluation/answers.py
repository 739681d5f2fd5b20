"""Right or wrong answers: accuracy on labels, F1 and exact match on short texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from loralloc import __version__
from loralloc.evaluation.figure import Figure, check_pairs, mean_figure

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(
    predictions: Sequence[str], responses: Sequence[str], *, labels: Sequence[str]
) -> list[Figure]:
    """Share of right labels; a text that is none of the labels is wrong, and its share is told.

    Args:
        predictions: One text an example, generated or the label that a classifier chose.
        responses: The right label of each.
        labels: All labels.

    Returns:
        "accuracy" and "not a label", in per cent.

    Raises:
        ValueError: If there are no labels, a response is none of them, there are no predictions
            or not one a response.
    """
    check_pairs("accuracy", predictions, [[response] for response in responses])
    if not labels:
        raise ValueError("Accuracy is for tasks with labels, and there are none: give the labels.")
    known = {_folded(label) for label in labels}
    for number, response in enumerate(responses, start=1):
        if _folded(response) not in known:
            raise ValueError(
                f"Example {number} has the response {response!r:.60}, which is none of the labels "
                f"{', '.join(labels)}."
            )
    right = [label_score(*pair) for pair in zip(predictions, responses, strict=True)]
    strays = [100.0 * (_folded(prediction) not in known) for prediction in predictions]
    implementation = f"loralloc {__version__}: whole answer, without regard to case"
    return [
        mean_figure("accuracy", right, implementation),
        mean_figure("not a label", strays, implementation),
    ]


def label_score(prediction: str, response: str) -> float:
    """Return 100 where the prediction is the right label, otherwise 0.

    Case and white space do not matter; anything else before or after the label does.
    """
    return 100.0 * (_folded(prediction) == _folded(response))


def f1_em(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Figure]:
    """F1 and exact match as SQuAD defines them (Rajpurkar et al. 2016), and the mean of the two.

    Each is the maximum over the right answers, averaged over the examples.

    Args:
        predictions: One text an example.
        answers: The right answers of each, at least one; their number may differ.

    Returns:
        "f1-em", "F1" and "EM", in per cent.

    Raises:
        ValueError: If an example has no answer, there are no predictions or not one an example.
    """
    check_pairs("f1-em", predictions, answers)
    f1 = [answer_f1(*pair) for pair in zip(predictions, answers, strict=True)]
    exact = [answer_em(*pair) for pair in zip(predictions, answers, strict=True)]
    both = [(one + other) / 2 for one, other in zip(f1, exact, strict=True)]
    implementation = f"loralloc {__version__}: SQuAD's normalisation, maximum over the answers"
    return [
        mean_figure("f1-em", both, implementation),
        mean_figure("F1", f1, implementation),
        mean_figure("EM", exact, implementation),
    ]


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of the shares of common words, for the nearest of the answers.

    A word counts as often as it is in both. Texts of which nothing is left after normalisation
    have F1 100 with each other and 0 with any other text.
    """
    return 100.0 * max(_word_f1(_words(prediction), _words(answer)) for answer in answers)


def answer_em(prediction: str, answers: Sequence[str]) -> float:
    """Return 100 where the prediction has the words of one of the answers in order, otherwise 0."""
    return 100.0 * any(_words(prediction) == _words(answer) for answer in answers)


def _folded(label: str) -> str:
    return " ".join(label.lower().split())


def _words(text: str) -> list[str]:
    """Lower case, no ASCII punctuation, then no articles: "The co-op's" -> ["coops"]."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _word_f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    common = (Counter(predicted) & Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))  # 2PR / (P + R), without a zero below
