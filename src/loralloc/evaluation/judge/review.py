"""Two contestants before a judge: every question in both orders, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from loralloc.evaluation.judge.contestants import Contestant
from loralloc.evaluation.judge.endpoint import Endpoint, EndpointError, NoReply
from loralloc.evaluation.judge.prompt import read_scores, review_request
from loralloc.evaluation.judge.questions import Question
from loralloc.evaluation.judge.replies import Reply, ReplyCache

Verdict = Literal["first", "second", "tie"]

CUT_OFF = ("length", "content_filter")
"""Ends of a reply that is not whole, whatever can be read in it."""

MOST_FAILED = 3
"""Requests one after the other without a reply; more are not made, since none may come."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """A reply of the judge to one question in one order."""

    text: str
    """Its words; it calls the contestant that it was shown first A, the other B."""

    scores: tuple[float, float] | None
    """Out of 10, of the pair's first and second contestant in whatever order they were shown;
    None where they are missing."""

    missing: str | None = None
    """Why there are no scores."""

    replied: bool = True
    """Whether there was a reply at all."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question, judged in both orders."""

    question: Question
    first_shown_first: Review
    second_shown_first: Review

    @property
    def scores(self) -> tuple[float, float] | None:
        """The mean of both orders; None where one is missing: half would bring back the bias."""
        one, other = self.first_shown_first.scores, self.second_shown_first.scores
        if one is None or other is None:
            return None
        return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2

    @property
    def verdict(self) -> Verdict | None:
        """Who has the higher mean score; None where it is missing."""
        return None if self.scores is None else _verdict(self.scores)

    @property
    def order_changed_verdict(self) -> bool | None:
        """Whether the two orders alone say different things; None where one is missing."""
        one, other = self.first_shown_first.scores, self.second_shown_first.scores
        return None if one is None or other is None else _verdict(one) != _verdict(other)

    @property
    def gain_of_place(self) -> float | None:
        """Points that being shown first is worth: the mean lead of who is; None as above."""
        one, other = self.first_shown_first.scores, self.second_shown_first.scores
        if one is None or other is None:
            return None
        return (one[0] - one[1] + other[1] - other[0]) / 2


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Two contestants on all questions; what is missing enters no figure but its own count."""

    first: str
    second: str
    comparisons: tuple[Comparison, ...]

    @property
    def judged(self) -> list[Comparison]:
        """The questions that have scores."""
        return [c for c in self.comparisons if c.scores is not None]

    @property
    def num_missing(self) -> int:
        """The questions that have none."""
        return len(self.comparisons) - len(self.judged)

    @property
    def without_reply(self) -> list[Review]:
        """The reviews that the endpoint gave no reply to; the same command asks for them again."""
        both = [r for c in self.comparisons for r in (c.first_shown_first, c.second_shown_first)]
        return [review for review in both if not review.replied]

    @property
    def mean_scores(self) -> tuple[float, float] | None:
        """Out of 10, over the questions that have scores; None where none has."""
        scores = [c.scores for c in self.comparisons if c.scores is not None]
        if not scores:
            return None
        return mean(s[0] for s in scores), mean(s[1] for s in scores)

    @property
    def mean_gain_of_place(self) -> float | None:
        """The mean of `Comparison.gain_of_place`; 0 for a judge without position bias."""
        gains = [c.gain_of_place for c in self.comparisons if c.gain_of_place is not None]
        return mean(gains) if gains else None

    @property
    def num_changed_by_order(self) -> int:
        """The questions on which the order alone changed the verdict."""
        return sum(c.order_changed_verdict is True for c in self.comparisons)

    def count(self, verdict: Verdict) -> int:
        """The questions with this verdict."""
        return sum(c.verdict == verdict for c in self.comparisons)


class Judge:
    """A model at an endpoint that is asked only what it has not been asked before."""

    def __init__(self, endpoint: Endpoint, cache: ReplyCache) -> None:
        """Ask `endpoint`, and keep what it says in `cache`."""
        self.endpoint = endpoint
        self.num_asked = 0
        """Replies that the endpoint gave."""
        self.num_cached = 0
        """Replies that were there from before."""
        self._cache = cache
        self._num_failed = 0

    def compare(
        self,
        first: Contestant,
        second: Contestant,
        questions: Sequence[Question],
        *,
        on_question: Callable[[], None] | None = None,
    ) -> PairResult:
        """Have two contestants reviewed on every question, in both orders.

        A request without a reply leaves its question missing, and the next one is asked.

        Raises:
            EndpointError: The endpoint gives no replies, for which `MOST_FAILED` in a row count;
                those so far are kept.
        """
        comparisons = []
        for question in questions:
            one = self._review(question, first, second)
            other = self._review(question, second, first)
            swapped = other.scores and (other.scores[1], other.scores[0])
            comparisons.append(
                Comparison(
                    question=question,
                    first_shown_first=one,
                    second_shown_first=replace(other, scores=swapped),
                )
            )
            if on_question:
                on_question()
        return PairResult(first=first.name, second=second.name, comparisons=tuple(comparisons))

    def _review(self, question: Question, a: Contestant, b: Contestant) -> Review:
        """One order, with scores of A and B; a reply that cannot be used is asked for once more."""
        answers = a.answers[question.number], b.answers[question.number]
        for again in (False, True):
            try:
                reply = self._reply(review_request(question, *answers, again=again))
            except NoReply as error:
                return Review(text="", scores=None, missing=str(error), replied=False)
            scores = read_scores(reply.text)
            cut = reply.finish_reason in CUT_OFF
            if scores and not cut:
                return Review(text=reply.text, scores=scores)
        reason = f"cut off ({reply.finish_reason})" if cut else "no two scores in the reply"
        return Review(text=reply.text, scores=None, missing=reason)

    def _reply(self, messages: Sequence[dict[str, str]]) -> Reply:
        request = self.endpoint.request(messages)
        reply = self._cache.get(request)
        if reply:
            self.num_cached += 1
            return reply
        try:
            reply = self.endpoint.ask(messages)
        except NoReply as error:
            self._num_failed += 1
            if self._num_failed < MOST_FAILED:
                raise
            raise EndpointError(
                f"{error} So it was with {MOST_FAILED} requests one after the other; what was "
                "judged so far is kept."
            ) from None
        self._num_failed = 0
        self._cache.put(request, reply)
        self.num_asked += 1
        return reply


def _verdict(scores: tuple[float, float]) -> Verdict:
    if scores[0] == scores[1]:
        return "tie"
    return "first" if scores[0] > scores[1] else "second"
