"""From prompts to the tokens that an answer goes on from, the same that training saw before it.

In training TRL tokenises prompt and completion together, or renders a whole conversation, and the
completion begins where the tokens of the prompt alone and of both differ. So a tokenizer may put an
end token behind a text, join a blank at the end of a prompt with the word after it, and a chat
template may write something that only a generated answer begins with ("<think>"): none of these is
in front of an answer in training, and none of them is here. What a template writes in front of
every answer that is there (an empty "<think></think>") is here: it is no part of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralloc.tasks.conversations import Chat, Prompt

ANSWER = "a"
"""Stands for any answer. It is behind a prompt only to see which tokens the prompt keeps then."""

MARK = "an answer to be found again"
"""Stands for an answer whose end is looked for."""


def start_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of each prompt that do not depend on what follows it.

    Raises:
        ValueError: The chat template does not render a conversation.
    """
    num_behind = _num_behind(tokenizer)
    return [
        _start_of_chat(tokenizer, prompt)
        if isinstance(prompt, Chat)
        else _start_of_text(tokenizer, prompt, num_behind)
        for prompt in prompts
    ]


def answered_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answer: str
) -> list[list[int]]:
    """The tokens of each prompt with an answer behind it, without an end token.

    Raises:
        ValueError: As `start_tokens`.
    """
    num_behind = _num_behind(tokenizer)
    return [
        _plain(tokenizer, _answered(tokenizer, prompt, answer))
        if isinstance(prompt, Chat)
        else _start_of_text(tokenizer, f"{prompt} {answer}", num_behind)
        for prompt in prompts
    ]


def end_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """The tokens that end an answer, the one that follows it in training first.

    That is the tokenizer's end token behind a text; in a conversation the token with which the
    template ends a turn, where it has one, and then the tokenizer's too.

    Raises:
        ValueError: There is none, or as `start_tokens`.
    """
    chat = next((prompt for prompt in prompts if isinstance(prompt, Chat)), None)
    ends = [] if chat is None else _ends_of_turn(tokenizer, chat)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError(
            "The tokenizer has no end token, so no answer could end; set its `eos_token`."
        )
    return ends


def _start_of_text(tokenizer: PreTrainedTokenizerBase, text: str, num_behind: int) -> list[int]:
    tokens: list[int] = tokenizer(text)["input_ids"]
    tokens = tokens[: len(tokens) - num_behind]
    # A blank at the end may belong to the answer's first word.
    return _common(tokens, tokenizer(text + ANSWER)["input_ids"]) if text[-1:].isspace() else tokens


def _start_of_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    alone = _rendered(tokenizer, chat, chat.messages, add_generation_prompt=True)
    followed = _rendered(tokenizer, chat, _with_answer(chat, MARK))
    before, _, _ = followed.rpartition(MARK)
    if before.startswith(alone) and before.removeprefix(alone).strip():
        alone = before  # the template has written something in front of every answer
    else:
        followed = _rendered(tokenizer, chat, _with_answer(chat, ANSWER))
    return _common(_plain(tokenizer, alone), _plain(tokenizer, followed))


def _num_behind(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts behind a text."""
    whole, text = tokenizer(ANSWER)["input_ids"], _plain(tokenizer, ANSWER)
    begins = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    return len(whole) - len(text) - begins[-1] if begins else 0


def _ends_of_turn(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """The token with which the chat template ends an answer, if it has one for that."""
    _, _, behind = _rendered(tokenizer, chat, _with_answer(chat, MARK)).rpartition(MARK)
    added = set(tokenizer.get_added_vocab().values())
    return [token for token in _plain(tokenizer, behind) if token in added][:1]


def _answered(tokenizer: PreTrainedTokenizerBase, chat: Chat, answer: str) -> str:
    """A rendered conversation up to the end of an answer."""
    _, _, behind = _rendered(tokenizer, chat, _with_answer(chat, MARK)).rpartition(MARK)
    return _rendered(tokenizer, chat, _with_answer(chat, answer)).removesuffix(behind)


def _with_answer(chat: Chat, answer: str) -> list[Mapping[str, Any]]:
    return [*chat.messages, {"role": "assistant", "content": answer}]


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    messages: Sequence[Mapping[str, Any]],
    **options: Any,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, **chat.template_options, **options
        )
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The model's chat template does not take this conversation: {reason}"
        ) from error
    return str(text)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that has its special tokens in it, or is to have none."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """What two sequences begin with."""
    pairs = zip(first, second, strict=False)
    count = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    return list(first if count is None else first[:count])
