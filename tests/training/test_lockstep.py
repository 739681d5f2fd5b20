"""Tasks that take turns, each in the state that it would find alone."""

import random

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from loralloc.training.lockstep import Lockstep, World


def world(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return World()


def together(*tasks):
    worlds = [world(seed) for seed in range(len(tasks))]
    steps = Lockstep([lambda task=task: task(steps) for task in tasks], worlds)
    return steps


def everybody(waiting):
    return {number: request * 10 for number, request in waiting.items()}


def test_what_is_asked_together_is_served_together():
    seen = []

    def asking(number, times):
        return lambda steps: [steps.ask(number, number + turn) for turn in range(times)]

    def serve(waiting):
        seen.append(dict(waiting))
        return everybody(waiting)

    assert together(asking(0, 2), asking(1, 3)).run(serve) == [[0, 10], [10, 20, 30]]
    assert seen == [{0: 0, 1: 1}, {0: 1, 1: 2}, {1: 3}]


def test_some_may_be_answered_before_others():
    def serve(waiting):
        return everybody({number: waiting[number] for number in [max(waiting)]})

    tasks = (lambda steps: steps.ask(0, 1), lambda steps: steps.ask(1, 2) + steps.ask(1, 3))
    assert together(*tasks).run(serve) == [10, 50]


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_each_draws_what_it_would_draw_alone():
    def task(number):
        return lambda steps: [(draw(), steps.ask(number, 0))[0] for _ in range(3)]

    together_drawn = together(task(0), task(1)).run(everybody)
    for seed, drawn in enumerate(together_drawn):
        world(seed).restore()
        assert drawn == [draw() for _ in range(3)]


def test_the_caller_finds_its_own_state_again():
    steps = together(lambda steps: draw())
    world(7)
    steps.run(everybody)
    after = draw()
    world(7)
    assert after == draw()


def test_gradient_accumulation_is_each_tasks_own():
    def task(number, flag):
        def run(steps):
            GradientState()._set_sync_gradients(flag)
            steps.ask(number, 0)
            return GradientState().sync_gradients

        return run

    assert together(task(0, True), task(1, False)).run(everybody) == [True, False]


def test_a_task_that_fails_ends_alone():
    def fails(steps):
        steps.ask(0, 1)
        raise ValueError("no")

    error, result = together(fails, lambda steps: steps.ask(1, 1) + steps.ask(1, 2)).run(everybody)
    assert isinstance(error, ValueError)
    assert result == 30


def test_where_nobody_can_be_served_all_end():
    ended = []

    def task(number):
        def run(steps):
            try:
                steps.ask(number, 0)
            finally:
                ended.append(number)

        return run

    def serve(waiting):
        raise MemoryError("too many")

    with pytest.raises(MemoryError, match="too many"):
        together(task(0), task(1)).run(serve)
    assert ended == [0, 1]
