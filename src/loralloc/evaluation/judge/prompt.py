"""The words for the judge (after Liu et al. 2024, Appendix D), and the scores in its reply."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loralloc.evaluation.judge.questions import Question

HIGHEST_SCORE = 10

INSTRUCTIONS = """\
Two assistants, A and B, were asked the same thing. Compare what they answered.

Review each of them concisely: how well it answers what was asked, whether it helps the user, and \
any issues it has. Neither the place in which it is shown nor its length is a merit. Then give \
each a score out of 10, where 10 is best."""

FORM = """\
Reply in this form, each part on a line of its own, and add nothing after it:
Review of A: two or three sentences
Review of B: two or three sentences
Score of A: a number
Score of B: a number"""

REMINDER = """\
Keep it short: a reply that is cut off, or that does not end with the two lines of scores, cannot \
be used."""

_WORDS = re.compile(r"(\w+)")

# What stands between "score" and the letter, one of each at most.
_FILLERS = (("of", "for"), ("assistant", "response"))


def review_request(
    question: Question,
    answers_of_a: Sequence[str],
    answers_of_b: Sequence[str],
    *,
    again: bool = False,
) -> list[dict[str, str]]:
    """Write the messages that ask for a review of two contestants.

    Args:
        question: What was asked.
        answers_of_a: The answers, one a turn, of the contestant that is shown first.
        answers_of_b: Those of the other.
        again: Whether the first reply could not be used.
    """
    several = len(question.turns) > 1
    parts = [INSTRUCTIONS]
    for turn, text in enumerate(question.turns, start=1):
        parts.append(_section(f"User, message {turn}" if several else "User", text))
    for letter, answers in (("A", answers_of_a), ("B", answers_of_b)):
        for turn, text in enumerate(answers, start=1):
            title = f"Assistant {letter}, answer {turn}" if several else f"Assistant {letter}"
            parts.append(_section(title, text.strip() or "(no answer)"))
    parts.append(f"[End]\n\n{FORM}")
    if again:
        parts.append(REMINDER)
    # One message of the user: some models' templates know no system message.
    return [{"role": "user", "content": "\n\n".join(parts)}]


def read_scores(reply: str) -> tuple[float, float] | None:
    """Find the scores of A and B in a reply.

    Returns:
        Both, from 0 to 10; None unless the reply gives exactly one of each in this range.
    """
    # What a model thinks aloud before its reply may hold scores that it then thinks better of.
    said = reply.rpartition("</think>")[2]
    found: dict[str, set[float]] = {"A": set(), "B": set()}
    for line in said.split("\n"):
        read = _score_in(line)
        if read is not None:
            letter, score = read
            found[letter].add(score)
    if any(len(scores) != 1 or max(scores) > HIGHEST_SCORE for scores in found.values()):
        return None
    (a,), (b,) = found["A"], found["B"]
    return a, b


def _score_in(line: str) -> tuple[str, float] | None:
    """The letter and score of such a line: "Score of A: 8", with emphasis, "/10" or "out of 10".

    Anything else on the line ("8/100", "8 or 9") makes it no score: a wrong one would be worse than
    none. It is read word by word: a pattern for all of it takes the square of a long line's length.
    """
    # What is between words, and before and after them, stands at even places.
    parts = _WORDS.split(line)
    gaps, words = parts[::2], [word.lower() for word in parts[1::2]]
    if words[:1] != ["score"]:
        return None
    at = 1
    for fillers in _FILLERS:
        if words[at : at + 1] and words[at] in fillers:
            at += 1
    if len(words) < at + 2 or words[at] not in ("a", "b") or gaps[at + 1].endswith("-"):
        return None
    letter, number = words[at].upper(), words[at + 1]
    end = at + 2
    if gaps[end] == "." and end < len(words) and words[end].isdecimal():
        number, end = f"{number}.{words[end]}", end + 1
    if not number.replace(".", "", 1).isdecimal():
        return None
    after, rest = gaps[end:], words[end:]
    if rest == ["10"]:
        plain = "/" in after[0]
    else:
        plain = not rest or (rest == ["out", "of", "10"] and after[1] == " ")
    if not plain or (rest and "/" in after[-1]):
        return None
    return letter, float(number)


def _section(title: str, text: str) -> str:
    return f"[{title}]\n{text}"
