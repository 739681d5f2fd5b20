"""The prompt of a turn, with the turns before it and what was answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from loralloc.tasks.alpaca import alpaca_example

PromptForm = Literal["chat", "alpaca"]
"""The model's chat template, or the prompt that Alpaca is trained with."""


def turn_prompt(
    turns: Sequence[str],
    answers: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
) -> str:
    """Write the prompt of the turn that comes after the last answer.

    Args:
        turns: What the user says in the whole conversation.
        answers: What was answered so far; fewer than there are turns.
        tokenizer: The model's, with a chat template where the form is "chat".
        form: How the conversation is written down.
    """
    asked = turns[: len(answers) + 1]
    if form == "alpaca":
        # The row's output is not part of the prompt, but no row is without one.
        prompts = [alpaca_example({"instruction": turn, "output": "-"}).prompt for turn in asked]
        earlier = zip(prompts[:-1], answers, strict=True)
        return "".join(f"{prompt} {answer}\n\n" for prompt, answer in earlier) + prompts[-1]
    messages = [{"role": "user", "content": asked[0]}]
    for answer, turn in zip(answers, asked[1:], strict=True):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": turn})
    prompt = str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    # A template that writes the start token would have it twice where the tokenizer adds it too.
    start = tokenizer.bos_token
    adds_start = start is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(start) if adds_start else prompt
