"""What is to be evaluated and how, as asked for and as it will be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loralloc.evaluation.generation import BEAM_OPTIONS
from loralloc.runs.folder import saved_conversation
from loralloc.runs.models import load_tokenizer
from loralloc.tasks.task import Task, has_spans

Decode = Literal["beam", "greedy", "labels"]

PAPER_BEAMS = 5
"""Beams of the paper's decoding."""

ANSWER_TOKENS = 64
"""Most tokens of an answer to a question."""

TEXT_TOKENS = 128
"""Most tokens of any other text, such as a sentence of E2E."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and how."""

    run: Path
    """A run folder."""

    task: str | None = None
    """The task; None for the one that the run was trained on."""

    data: str | None = None
    """A folder, a file or a Hub name; None for the run's data, or for another task the task's."""

    split: str = "test"
    """train, validation or test, or a split's own name in the source."""

    decode: Decode | None = None
    """How a language model answers; None for beam, or for greedy where there is one beam."""

    num_beams: int | None = None
    """Beams; None for the paper's 5."""

    max_new_tokens: int | None = None
    """Most tokens of an answer; None for as many as the task's labels need, or plenty."""

    batch_size: int = 32
    """Most examples at once."""

    limit: int | None = None
    """Only so many examples, the first; None for all."""

    base: bool = False
    """Without the adapter."""

    trust_remote_code: bool = False
    """Whether code that comes with the backbone may run."""

    output_dir: Path | None = None
    """Where results go; None for a folder of this evaluation's own in the run folder."""

    overwrite: bool = False
    """Forget an earlier evaluation in the same folder."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("num_beams", "max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a language model answers."""

    decode: Decode
    """beam and greedy generate text; labels chooses the most probable label, which is not the
    paper's decoding."""

    num_beams: int
    """Beams; 1 unless decode is beam."""

    max_new_tokens: int
    """Most tokens of an answer, the end token included."""

    def as_data(self) -> dict[str, Any]:
        """What an answer depends on, for `eval.json`."""
        if self.decode == "labels":
            return {"decode": self.decode}
        return {**asdict(self), **(BEAM_OPTIONS if self.decode == "beam" else {})}


def no_decoding(request: Request, task: Task, *, head: str) -> None:
    """Refuse options for language models, of which an encoder reads none.

    Raises:
        ValueError: One is given.
    """
    given = {
        "decode": request.decode,
        "num_beams": request.num_beams,
        "max_new_tokens": request.max_new_tokens,
        "base": request.base or None,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`--{name}` is for language models, and the run in {request.run} has a {head} "
                "head; leave it out."
            )


def decoding_of(request: Request, task: Task) -> Decoding:
    """Settle how a language model answers.

    Raises:
        ValueError: If options contradict each other or the task.
    """
    decode = request.decode or ("greedy" if request.num_beams == 1 else "beam")
    if decode == "labels" and not task.labels:
        raise ValueError(
            f"`--decode labels` scores the labels of a task, and {task.name} has none; use beam or "
            "greedy."
        )
    if decode == "beam" and request.num_beams == 1:
        raise ValueError("`--num_beams` is 1, which is no beam search; use `--decode greedy`.")
    if decode != "beam" and request.num_beams not in (None, 1):
        raise ValueError(
            f"`--num_beams` is {request.num_beams}, but `--decode {decode}` has no beams; leave "
            "one of the two out."
        )
    if decode == "labels" and request.max_new_tokens is not None:
        raise ValueError(
            "`--max_new_tokens` bounds generated text, and `--decode labels` generates none; leave "
            "one of the two out."
        )
    return Decoding(
        decode=decode,
        num_beams=(request.num_beams or PAPER_BEAMS) if decode == "beam" else 1,
        max_new_tokens=request.max_new_tokens or _most_new_tokens(request.run, task),
    )


def folder_of(request: Request, *, head: str, task: Task, decoding: Decoding | None) -> Path:
    """Where the results go: `--output_dir`, or eval/TASK-SPLIT-WAY in the run folder.

    Such as sst2-test-beam5, sst2-test-labels-base or squad-validation-span: evaluations of
    different things lie beside each other.
    """
    if request.output_dir is not None:
        return request.output_dir
    way: str = decoding.decode if decoding else head
    if decoding and decoding.decode == "beam":
        way = f"beam{decoding.num_beams}"
    parts = [task.name, request.split.replace("/", "_"), way, *(["base"] if request.base else [])]
    return request.run / "eval" / "-".join(parts)


def _most_new_tokens(run: Path, task: Task) -> int:
    """Tokens of the longest label and the end token; without labels, plenty."""
    if task.labels:
        joint = "" if saved_conversation(run) else " "  # a blank is behind a text only
        texts = [joint + label for label in task.labels]
        tokens = load_tokenizer(str(run))(texts, add_special_tokens=False)["input_ids"]
        return 1 + max(map(len, tokens))
    return ANSWER_TOKENS if has_spans(task) else TEXT_TOKENS
