"""Questions about a text: their prompt, and answers as stretches of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loralloc.tasks.task import Example, Span

Place = tuple[str, int]
"""A stretch of a context: its characters, and where it begins."""


def reading_example(
    *, context: str, question: str, answers: Sequence[str], places: Sequence[Place]
) -> Example:
    """Make the example of a question: the first answer is trained on, any of them is right.

    Args:
        context: The text as the row has it, white space around it included.
        question: Without white space around it.
        answers: At least one.
        places: Where they are in the context; the first belongs to the first answer.
    """
    places = list(dict.fromkeys(places))
    return Example(
        prompt=f"Context:\n{context.strip()}\nQuestion:\n{question}",
        response=answers[0],
        span=Span(
            question=question,
            context=context,
            answers=tuple(stretch for stretch, _ in places),
            starts=tuple(start for _, start in places),
        ),
        references=tuple(dict.fromkeys(answers)),
    )


def find(context: str, answer: str) -> list[Place]:
    """Find every place of the context that says the answer, in order.

    White space may differ: SQuAD has answers with two blanks where the context has one. The
    stretch found is the context's own.
    """
    pattern = r"\s+".join(re.escape(word) for word in answer.split())
    return [(match.group(), match.start()) for match in re.finditer(pattern, context)]
