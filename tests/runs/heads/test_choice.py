"""Which head goes with which model and task."""

import pytest

from loralloc.runs.heads.choice import choose_head, has_spans
from loralloc.runs.settings import RunArguments
from loralloc.tasks.catalog import TASKS, get_task


def choose(task=None, *, is_encoder, **options):
    task = get_task(task) if task else None
    return choose_head(RunArguments(**options), task, model="m", is_encoder=is_encoder)


@pytest.mark.parametrize("task", (None, *TASKS))
def test_a_language_model_keeps_its_head_whatever_the_task(task):
    assert choose(task, is_encoder=False) == "lm"


@pytest.mark.parametrize(
    ("task", "head"),
    [
        (None, "classification"),
        ("sst2", "classification"),
        ("rte", "classification"),
        ("squad", "span"),
        ("record", "span"),
    ],
)
def test_an_encoder_gets_the_head_of_its_task(task, head):
    assert choose(task, is_encoder=True) == head
    assert choose(task, is_encoder=True, head=head) == head


def test_span_tasks_are_those_whose_examples_have_spans():
    assert [name for name, task in TASKS.items() if has_spans(task)] == ["record", "squad"]


@pytest.mark.parametrize(
    ("task", "is_encoder", "options", "words"),
    [
        ("e2e", True, {}, "m is an encoder and cannot generate, and the task e2e is to generate"),
        ("alpaca", True, {}, "the task alpaca is to generate text; use a causal language model."),
        ("squad", True, dict(head="lm"), "m is an encoder and cannot generate; use"),
        ("squad", False, dict(head="span"), "m reads in one direction only"),
        ("sst2", True, dict(head="span"), "and the task sst2 has none; use one of the tasks rec"),
        (None, True, dict(head="span"), "and no task is named; use one of the tasks record, squad"),
        (None, True, dict(stride=8), "`stride` is read by the span head, and this run has the cl"),
        ("squad", False, dict(stride=0), "`stride` is read by the span head, and this run has th"),
        (None, False, dict(text_column="a"), "`text_column` is read by the classification head"),
        (None, False, dict(text_pair_column="a"), "or use `--head classification`"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(task, is_encoder, options, words):
    with pytest.raises(ValueError) as caught:
        choose(task, is_encoder=is_encoder, **options)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
