"""Conversations in rows: messages by speakers, and what all of a data set's have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loralloc.tasks.task import RowError

SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of who speaks, and those that chat templates know."""

TOOLS, TEMPLATE_OPTIONS = "tools", "chat_template_kwargs"
"""Columns that TRL reads beside messages: functions to call, and arguments of the template."""

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages that a model is to answer through its chat template."""

    messages: Sequence[Message]
    """The conversation, the last message being the one to answer."""

    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, the tools among them."""


Prompt = str | Chat
"""What a language model goes on from: a text as it is, or a conversation."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every conversation of a data set has; a question after training is asked with it too."""

    system: str | None = None
    """What the system message says that each begins with."""

    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, the tools among them."""

    def ask(self, text: str) -> Chat:
        """A conversation of this kind in which the user has said `text`."""
        return self.ask_turns((text,), ())

    def ask_turns(self, turns: Sequence[str], answers: Sequence[str]) -> Chat:
        """Such a conversation after some answers: its last message is the turn that follows them.

        Args:
            turns: What the user says in the whole conversation.
            answers: What was answered so far; fewer than there are turns.
        """
        messages = [] if self.system is None else [_message("system", self.system)]
        for turn, answer in zip(turns, answers, strict=False):
            messages += [_message("user", turn), _message("assistant", answer)]
        messages.append(_message("user", turns[len(answers)]))
        return Chat(messages=messages, template_options=self.template_options)

    def as_data(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def common(rows: Iterable[Mapping[str, Any]], column: str) -> Common:
    """What all conversations in a column of messages have in common."""
    first: dict[str, Any] | None = None
    for row in rows:
        found = {"system": _system(row[column]), **template_options(row)}
        first = found if first is None else {k: v for k, v in first.items() if found.get(k) == v}
    shared = first or {}
    return Common(system=shared.pop("system", None), template_options=shared)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's arguments of the chat template, as TRL takes them from its columns."""
    tools = row.get(TOOLS)
    options = dict(row.get(TEMPLATE_OPTIONS) or {})
    if tools:
        options[TOOLS] = json.loads(tools) if isinstance(tools, str) else tools
    return options


def check_options(row: Mapping[str, Any]) -> None:
    """Refuse tools and arguments of the template that TRL could not read.

    Raises:
        RowError: Naming the column.
    """
    options, tools = row.get(TEMPLATE_OPTIONS, {}), row.get(TOOLS)
    if not isinstance(options, Mapping):
        raise RowError(TEMPLATE_OPTIONS, f"must be an object of options and is {options!r:.60}")
    if isinstance(tools, str):
        try:
            json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(TOOLS, f"is not valid JSON: {error.msg}") from error


def read_messages(value: Sequence[Any], column: str) -> list[Message]:
    """Messages with `role` and `content`; those with `from` and `value` are brought to that form.

    Raises:
        RowError: A message names no speaker or says nothing; it names the column.
    """
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise RowError(column, f"must be a list of messages, and holds {message!r:.60}")
        if not isinstance(message.get("from"), str | None):
            raise RowError(column, f"has in message {number} `from` of {message['from']!r:.60}")
        renamed = _renamed(message)
        if not isinstance(renamed.get("role"), str) or not renamed["role"]:
            raise RowError(
                column, f"has in message {number} no `role` (or `from`): {message!r:.60}"
            )
        if renamed.get("content") is None and not renamed.get("tool_calls"):
            raise RowError(
                column, f"has in message {number} no `content` (or `value`): {message!r:.60}"
            )
        messages.append(renamed)
    return messages


def is_renamed(value: Sequence[Any]) -> bool:
    """Whether messages have `from` and `value`, so that `read_messages` gives others."""
    return any(isinstance(m, Mapping) and m.get("from") is not None for m in value)


def _renamed(message: Mapping[str, Any]) -> Message:
    if message.get("from") is None:
        return dict(message)
    speaker = message["from"]
    kept = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")}
    return {"role": SPEAKERS.get(speaker, speaker), "content": message.get("value"), **kept}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(messages: Sequence[Message]) -> str | None:
    """What the system message says that a conversation begins with."""
    first = messages[0]
    content = first.get("content")
    return content if first.get("role") == "system" and isinstance(content, str) else None
