"""Who is compared: a run, a model, or a file of ready answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralloc.evaluation.judge.answers import (
    Answering,
    answer_questions,
    kept_answers,
)
from loralloc.evaluation.judge.conversation import PromptForm
from loralloc.evaluation.judge.questions import Answers, Question, check_answers, read_answers
from loralloc.runs.folder import ANSWERS, SETTINGS, config_of, saved_conversation
from loralloc.runs.models import load_model, load_tokenizer
from loralloc.runs.settings import saved
from loralloc.runs.trained import load_trained

ADAPTER_NAME = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A name and its answers."""

    name: str
    """What tables call it."""

    source: Path
    """The file of its answers."""

    answers: Answers
    """Its answers to all questions."""


def contestant_names(given: Sequence[str]) -> list[str]:
    """Name every contestant: the last part of its path, or the path where that is not enough.

    Raises:
        ValueError: If one is given twice.
    """
    twice = [text for text in given if given.count(text) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name every contestant once.")
    short = [Path(text).stem if Path(text).is_file() else Path(text).name for text in given]
    if len(set(short)) == len(short):
        return short
    return list(given)


def contestant(
    given: str,
    questions: Sequence[Question],
    *,
    name: str,
    decoding: Answering,
    output_dir: Path,
    trust_remote_code: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Contestant:
    """Read the answers of a contestant, or let its model give those that are not there yet.

    Args:
        given: A file of answers; the folder of a run, which keeps its answers; or a model, by
            folder or by name, whose answers are kept in `output_dir`.
        questions: What is to be answered.
        name: What tables call it.
        decoding: How a model answers.
        output_dir: The folder of results.
        trust_remote_code: Whether code that comes with a model may run.
        on_batch: Called after each batch with the questions answered, and those to answer.

    Raises:
        ValueError: If there is no such run, model or file, or its answers do not fit.
    """
    path = Path(given)
    if path.is_file():
        answers = read_answers(path)
        check_answers(answers, questions, source=str(path))
        return Contestant(name=name, source=path, answers=answers)
    is_run = config_of(path) is not None
    if path.is_dir() and not is_run and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is neither a finished run (adapter_config.json) nor a model (config.json); "
            "name one of them, or a file of answers."
        )
    tokenizer = load_tokenizer(given, trust_remote_code=trust_remote_code)
    form = decoding.form or _usual_form(path, tokenizer)
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError(f"{given} has no chat template; use `--prompt alpaca`.")
    conversation = saved_conversation(path) if form == "chat" else None
    made_by = _fingerprint(path / ADAPTER_NAME) if is_run else _model_as_it_is(given)
    made_with = {
        "model": made_by,
        "prompt": form,
        "num_beams": decoding.num_beams,
        "max_new_tokens": decoding.max_new_tokens,
        **({"conversation": conversation.as_data()} if conversation else {}),
    }
    source = path / ANSWERS if is_run else output_dir / _file_of(given, made_by)
    answers = kept_answers(source, made_with)
    if any(question.number not in answers for question in questions):
        model: Any = (
            load_trained(path, trust_remote_code=trust_remote_code)[0]
            if is_run
            else load_model(given, trust_remote_code=trust_remote_code)
        )
        answers = answer_questions(
            model,
            tokenizer,
            questions,
            source,
            model_id=name,
            made_with=made_with,
            form=form,
            decoding=decoding,
            conversation=conversation,
            on_batch=on_batch,
        )
    check_answers(answers, questions, source=str(source))
    return Contestant(name=name, source=source, answers=answers)


def _usual_form(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """What the model was trained with, as far as that is known."""
    trained_on = saved(folder).get("task") if (folder / SETTINGS).is_file() else None
    return "alpaca" if trained_on == "alpaca" or not tokenizer.chat_template else "chat"


def _model_as_it_is(given: str) -> str:
    """A model's name; of a folder with its weights' sizes and times, which a new export changes."""
    weights = sorted(Path(given).glob("*.safetensors"))
    if not weights:
        return given
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return f"{given} {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def _file_of(given: str, model: str) -> str:
    """The file of a model's answers, one for each model whatever their folders are called."""
    return f"{Path(given).name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}-{ANSWERS}"


def _fingerprint(path: Path) -> str:
    """Tell two trainings into one folder apart."""
    return "adapter " + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
