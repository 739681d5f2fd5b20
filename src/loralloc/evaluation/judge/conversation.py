"""The prompt of a turn, with the turns before it and what was answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loralloc.tasks.alpaca import alpaca_example
from loralloc.tasks.conversations import Common, Prompt

PromptForm = Literal["chat", "alpaca"]
"""The model's chat template, or the prompt that Alpaca is trained with."""


def turn_prompt(
    turns: Sequence[str],
    answers: Sequence[str],
    *,
    form: PromptForm,
    conversation: Common,
) -> Prompt:
    """Write the prompt of the turn that comes after the last answer.

    Args:
        turns: What the user says in the whole conversation.
        answers: What was answered so far; fewer than there are turns.
        form: How the conversation is written down.
        conversation: What it has besides, where the form is "chat".
    """
    if form == "chat":
        return conversation.ask_turns(turns, answers)
    # The row's output is not part of the prompt, but no row is without one.
    asked = turns[: len(answers) + 1]
    prompts = [alpaca_example({"instruction": turn, "output": "-"}).prompt for turn in asked]
    earlier = zip(prompts[:-1], answers, strict=True)
    return "".join(f"{prompt} {answer}\n\n" for prompt, answer in earlier) + prompts[-1]
