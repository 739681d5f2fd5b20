"""What a task is: a data set whose rows become a prompt, a response and perhaps a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Metric = Literal["accuracy", "f1-em", "bleu", "rouge-l", "meteor", "judge"]

HubRule = Literal["official", "train_1000", "halve_validation"]
"""How the splits of a task come from those of its Hub data set (Liu et al. 2024, Appendix B):
as they are; 1,000 rows of train become the development set and the official one the test set;
or the official development set is halved into the two."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A question whose answer is a stretch of a text: what a span predictor reads."""

    question: str
    """The question, without white space around it."""

    context: str
    """The text that holds the answer, as the row has it: positions count its characters."""

    answers: tuple[str, ...]
    """All right answers, at least one."""

    starts: tuple[int, ...]
    """Where each answer begins in the context."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, as a language model and as an encoder classifier read it."""

    prompt: str
    """What the model is given; ends in no white space, so that its tokens do not depend on
    what follows."""

    response: str
    """What the loss is on and what a prediction is compared with, without white space around
    it; empty where no answer is the right one (MT-Bench)."""

    label: int | None = None
    """Index into the task's labels; None where the task generates text."""

    text: str | None = None
    """What an encoder classifier reads; None where the task has no labels."""

    text_pair: str | None = None
    """The second text, for tasks about two."""

    span: Span | None = None
    """What a span predictor reads; None where the answer is not a stretch of a text."""

    references: tuple[str, ...] = ()
    """All texts that a generated one is measured against; empty where the task has labels."""

    turns: tuple[str, ...] = ()
    """What the user says in each turn of a conversation; its first is the prompt. Empty where
    the prompt is all there is."""

    turn_references: tuple[str, ...] = ()
    """A right answer to each turn, an empty text where a turn has none; empty where no turn has
    one."""

    @property
    def completion(self) -> str:
        """The response behind the one blank that joins it to the prompt.

        Byte-level and SentencePiece tokenisers keep a blank with the word after it, so the
        tokens of the prompt are a prefix of the tokens of prompt + completion. (A line break
        at the end of the prompt would not be as safe: some vocabularies merge it with the full
        stop before it.) Every task is joined in this way.
        """
        return " " + self.response


class Task(Protocol):
    """A data set with its prompt and its metric (Liu et al. 2024, Appendices B and C)."""

    name: str
    """The name on the command line, in lower case."""

    hub_name: str | None
    """The data set on the Hub; None where it is not there, or loralloc makes the rows itself."""

    hub_config: str | None
    """The configuration of the Hub data set, where it has several."""

    hub_rule: HubRule
    """How the Hub's splits become train, validation and test; `splits.load_task` applies it."""

    official_sizes: Mapping[str, int]
    """Rows of each official split that is used, by its own name."""

    licence: str
    """The licence of the rows, or a word on why there is none."""

    metrics: tuple[Metric, ...]
    """How predictions are scored; empty for a task that is only trained on."""

    labels: tuple[str, ...]
    """The response of each label, in the order of the label's index; empty for generation."""

    columns: tuple[str, ...]
    """The columns that every row must have."""

    def example(self, row: Mapping[str, object]) -> Example:
        """Turn one row into an example.

        Raises:
            RowError: If a field of the row breaks the task's contract.
        """
        ...


def has_spans(task: Task) -> bool:
    """Whether the answers of a task are stretches of a text, which is what f1-em measures."""
    return "f1-em" in task.metrics


class RowError(ValueError):
    """A row breaks the contract of its task; who reads the file adds its name and the row."""

    def __init__(self, field: str, message: str) -> None:
        """Name the field, and say what is wrong with it in words that follow its name."""
        super().__init__(f"field '{field}' {message}")
        self.field = field
        self.message = message


def text_field(row: Mapping[str, object], field: str) -> str:
    """Return a field that must hold text, without the white space around it.

    Raises:
        RowError: If the field is missing, is not a string or holds only white space.
    """
    value = row.get(field)
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, str):
        raise RowError(field, f"must be text and is {value!r:.60}")
    if not value.strip():
        raise RowError(field, "is empty")
    return value.strip()


def texts_field(row: Mapping[str, object], field: str) -> tuple[str, ...]:
    """Return a field that must hold a list of texts, each without the white space around it.

    Raises:
        RowError: If the field is missing, is not such a list, or is or holds nothing.
    """
    value = row.get(field)
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RowError(field, f"must be a list of texts and is {value!r:.60}")
    if not value:
        raise RowError(field, "is empty")
    if not all(text.strip() for text in value):
        raise RowError(field, f"holds an empty text: {value!r:.60}")
    return tuple(text.strip() for text in value)


def label_field(row: Mapping[str, object], field: str, *, labels: tuple[str, ...]) -> int:
    """Return a field that must hold the index of one of the labels, as a number or its digits.

    Raises:
        RowError: If the field is missing or is not such an index. The Hub marks a hidden label
            with -1, and the message says so.
    """
    value = row.get(field)
    if value is None:
        raise RowError(field, "is missing")
    digits = str(value) if isinstance(value, int | str) else ""  # "True" is not an index
    if digits == "-1":
        raise RowError(field, "is -1, the mark of a hidden label: choose a split with labels")
    indices = [str(index) for index in range(len(labels))]
    if digits not in indices:
        meaning = ", ".join(f"{index} ({label})" for index, label in enumerate(labels))
        raise RowError(field, f"must be one of {meaning} and is {value!r:.60}")
    return indices.index(digits)
