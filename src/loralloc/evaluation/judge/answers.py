"""A model's answers to the questions, kept in a file that an interrupted run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralloc.allocation.files import write_text
from loralloc.allocation.layers import base_model
from loralloc.evaluation.generation import generate
from loralloc.evaluation.judge.conversation import PromptForm, turn_prompt
from loralloc.evaluation.judge.questions import Answers, Question, read_answers
from loralloc.evaluation.tokens import start_tokens
from loralloc.tasks.conversations import Common, Prompt
from loralloc.tasks.source import read_table


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a model answers."""

    num_beams: int = 5
    """Beams; 1 is greedy, 5 the paper's."""

    max_new_tokens: int = 1024
    """Most tokens of an answer; MT-Bench's own limit."""

    batch_size: int = 8
    """Questions answered together; the file grows by so many at a time."""

    form: PromptForm | None = None
    """How a conversation becomes a prompt; None: the task alpaca's prompt for a run of that task
    or a model without a chat template, else the chat template."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("num_beams", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")


def kept_answers(path: Path, made_with: Mapping[str, object]) -> Answers:
    """Read the answers that an earlier run left in a file; none where there is no file.

    Args:
        path: The file.
        made_with: What the answers to come are made with.

    Raises:
        ValueError: If those in the file were made in another way, or cannot be read.
    """
    if not path.exists():
        return {}
    for row in read_table(path):
        if row.get("made_with") != made_with:
            raise ValueError(
                f"{path} holds answers made with {row.get('made_with')}, and those asked for are "
                f"made with {dict(made_with)}; take the same options, or move the file away."
            )
    return read_answers(path)


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: Path,
    *,
    model_id: str,
    made_with: Mapping[str, object],
    form: PromptForm,
    decoding: Answering,
    conversation: Common | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer every turn of the questions that the file has no answers to, and write it.

    Args:
        model: A causal language model, adapted or not.
        tokenizer: Its tokenizer.
        questions: What to answer.
        path: The file; answers already in it are kept.
        model_id: Whose answers they are.
        made_with: What they depend on, written beside each.
        form: How a conversation becomes a prompt.
        decoding: How the model answers.
        conversation: What a conversation has besides its turns, as the model was trained.
        on_batch: Called after each batch with the questions answered, and those to answer.

    Returns:
        All answers in the file.

    Raises:
        ValueError: As `kept_answers`.
    """
    answers = dict(kept_answers(path, made_with))
    rows = list(read_table(path)) if answers else []
    pending = [question for question in questions if question.number not in answers]

    def ask(question: Question, given: Sequence[str]) -> Prompt:
        return turn_prompt(question.turns, given, form=form, conversation=conversation or Common())

    _check_room(model, tokenizer, pending, decoding.max_new_tokens, ask)
    for start in range(0, len(pending), decoding.batch_size):
        batch = pending[start : start + decoding.batch_size]
        given: list[list[str]] = [[] for _ in batch]
        for turn in range(max(len(question.turns) for question in batch)):
            asked = [i for i, question in enumerate(batch) if turn < len(question.turns)]
            prompts = [ask(batch[i], given[i]) for i in asked]
            texts = generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=decoding.max_new_tokens,
                num_beams=decoding.num_beams,
                batch_size=decoding.batch_size,
            )
            for i, text in zip(asked, texts, strict=True):
                given[i].append(text)
        for question, turns in zip(batch, given, strict=True):
            answers[question.number] = tuple(turns)
            rows.append(
                {
                    "question_id": question.number,
                    "model_id": model_id,
                    "turns": turns,
                    "made_with": dict(made_with),
                }
            )
        _write(path, rows)
        if on_batch:
            on_batch(start + len(batch), len(pending))
    return answers


def _check_room(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    most: int,
    ask: Callable[[Question, Sequence[str]], Prompt],
) -> None:
    """Refuse answers so long that a conversation would not fit into the model's context.

    Raises:
        ValueError: Naming the length that fits.
    """
    context: int | None = getattr(base_model(model).config, "max_position_embeddings", None)
    if context is None:
        return
    for question in questions:
        turns = len(question.turns)
        (asked,) = start_tokens(tokenizer, [ask(question, ["."] * (turns - 1))])
        room = (context - len(asked)) // turns
        if most > room:
            raise ValueError(
                f"`max_new_tokens` is {most}, and question {question.number} has {turns} turns: "
                f"with {len(asked)} tokens of its own, answers of that length do not fit into the "
                f"model's context of {context:,}; give at most {room}."
            )


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
