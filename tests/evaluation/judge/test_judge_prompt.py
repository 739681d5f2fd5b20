import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloc.evaluation.judge.prompt import read_scores, review_request
from loralloc.evaluation.judge.questions import Question

QUESTION = Question(number=81, turns=("Name a fruit.", "And another."))


def test_both_conversations_are_shown_in_the_order_given():
    (message,) = review_request(QUESTION, ("Apple.", "Pear."), ("Plum.", ""))
    assert message["role"] == "user"
    shown = [
        "[User, message 1]\nName a fruit.",
        "[User, message 2]\nAnd another.",
        "[Assistant A, answer 1]\nApple.",
        "[Assistant A, answer 2]\nPear.",
        "[Assistant B, answer 1]\nPlum.",
        "[Assistant B, answer 2]\n(no answer)",
        "Score of A: a number",
        "Score of B: a number",
    ]
    places = [message["content"].index(part) for part in shown]
    assert places == sorted(places)


def test_a_single_turn_is_not_numbered():
    question = Question(number=1, turns=("Name a fruit.",))
    content = review_request(question, ["Apple."], ["Plum."])[0]["content"]
    assert "[User]\nName a fruit." in content and "[Assistant B]\nPlum." in content


def test_the_second_request_differs_so_that_the_reply_can():
    first, second = (
        review_request(QUESTION, ("a", "b"), ("c", "d"), again=again)[0]["content"]
        for again in (False, True)
    )
    assert second.startswith(first) and len(second) > len(first)


@pytest.mark.parametrize(
    "reply",
    [
        "Review of A: good.\nReview of B: bad.\nScore of A: 8\nScore of B: 3.5",
        "Score of A: 8/10\nScore of B: 3.5 / 10",
        "Score of A: 8 out of 10.\nScore of B: 3.5 out of 10.",
        "**Score of A:** 8\n**Score of B:** 3.5",
        "- **Score of A: 8/10**\r\n- **Score of B: 3.5/10**\r\n",
        "score a - 8\nscore b = 3.5",
        "Score of Assistant A: [8]\nScore for Assistant B: [3.5]",
        "Score of B: 3.5\nScore of A: 8\nScore of A: 8",
        "<think>Score of A: 1\nScore of B: 9</think>\nScore of A: 8\nScore of B: 3.5",
    ],
)
def test_scores_are_read(reply):
    assert read_scores(reply) == (8, 3.5)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot compare them.",
        "Score of A: 8",
        "Score of A: 8\nScore of A: 3",
        "Score of A: 8\nScore of B: 3\nScore of B: 4",
        "Score of A: 11\nScore of B: 3",
        "Score of A: -8\nScore of B: 3",
        "Score of A: 80/100\nScore of B: 30/100",
        "Score of A: 8/100\nScore of B: 3/100",
        "Score of A: 8 or 9\nScore of B: 3",
        "Score of A: 8, 5\nScore of B: 3",
        "Score of A: 8\nScore of B: a number",
        "Score of A:\n8\nScore of B:\n3",
        "Underscore of A: 8\nUnderscore of B: 3",
        "Score of Apple: 8\nScore of Banana: 3",
        "<think>Score of A: 8\nScore of B: 3</think>\nBoth are fine.",
    ],
)
def test_anything_else_is_no_score(reply):
    assert read_scores(reply) is None


@pytest.mark.parametrize("score", (0, 10))
def test_the_ends_of_the_scale(score):
    assert read_scores(f"Score of A: {score}\nScore of B: 5") == (score, 5)


# All of a line's form at once, as `read_scores` was first written; it takes the square of a line's
# length in steps.
PATTERN = re.compile(
    r"^[^\w\n]*score\W+(?:of\W+|for\W+)?(?:assistant\W+|response\W+)?(?P<letter>[AB])\b"
    r"[^\w\n]*(?<!-)(?P<score>\d+(?:\.\d+)?)[^\w\n]*?(?:(?:/|\bout of\b)[^\w\n]*10)?[^\w\n/]*$",
    re.IGNORECASE,
)
PARTS = st.sampled_from(
    [
        *("score", "Score", "of", "for", "assistant", "response", "A", "b", "out of", "out  of"),
        *("8", "3.5", "10", "100", "9", "or", "_", "/", " / ", " ", " ", ":", "**", "-", ".", "["),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, max_size=9).map("".join), st.booleans())
def test_lines_are_read_as_the_pattern_says(line, begins):
    line = f"Score of A{line}" if begins else line
    found = PATTERN.match(line)
    expected = None if found is None else float(found["score"])
    assert read_scores(f"{line}\nScore of {other(found)}: 1") == both(found, expected)


def other(found) -> str:
    return "A" if found and found["letter"].upper() == "B" else "B"


def both(found, score):
    if found is None or score > 10:
        return None
    return (1, score) if found["letter"].upper() == "B" else (score, 1)


@pytest.mark.parametrize(
    "line",
    ("Score of A: 8" + "/" * 10**6, "/" * 10**6, "Score " * 10**5, "8" * 10**6, "*/" * 10**6),
)
def test_a_long_line_is_read_in_one_go(line):
    begin = time.monotonic()
    read_scores(f"{line}\nScore of B: 1")
    assert time.monotonic() - begin < 5
