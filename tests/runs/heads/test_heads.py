"""Which head goes with which model and task."""

from typing import get_args, get_type_hints

import pytest

from loralloc.cli import tasks as tasks_verb
from loralloc.evaluation.predictors import WAYS
from loralloc.runs.arguments import RunArguments
from loralloc.runs.run import HEADS, choose_head
from loralloc.tasks.catalog import TASKS, get_task
from loralloc.tasks.task import has_spans


def choose(task=None, *, is_encoder, **options):
    task = get_task(task) if task else None
    return choose_head(RunArguments(**options), task, model="m", is_encoder=is_encoder).name


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


def test_what_names_heads_elsewhere_names_all_of_them():
    assert get_args(get_type_hints(RunArguments)["head"]) == ("auto", *HEADS)
    assert WAYS.keys() == HEADS.keys()
    assert [head.name for head in HEADS.values()] == list(HEADS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_table_of_tasks_names_the_heads_that_suit_one(task):
    suited = [
        name
        for name, head in HEADS.items()
        if any(head.suits(task, is_encoder) for is_encoder in (False, True))
    ]
    assert tasks_verb.heads(task) == suited


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
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(task, is_encoder, options, words):
    with pytest.raises(ValueError) as caught:
        choose(task, is_encoder=is_encoder, **options)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
