"""Several tasks in one process that take turns and meet, each with the global state that it left.

A trainer's loop belongs to the trainer: nothing outside can take one step of it. So every task has
a thread, of which one alone runs at any time, in a fixed order, until it asks for something. What
tasks ask for is served together, once all of them wait. What is global to a process (random
generators, Accelerate's state of gradients) is put back whenever a task goes on, so that each finds
what it would have found alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

Serve = Callable[[Mapping[int, Any]], Mapping[int, Any]]
"""From what the waiting tasks ask for, by task, to the answers of some of them or all."""


class Abandoned(BaseException):
    """A task is to end because the others cannot go on; it passes every `except Exception`."""


class World:
    """What a process has one of, at one moment."""

    def __init__(self) -> None:
        """Take it as it is now."""
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.random.get_rng_state()
        has_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if has_cuda else None
        self._gradients = dict(GradientState._shared_state)

    def restore(self) -> None:
        """Make it again what it was."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.random.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._gradients)


@dataclass(kw_only=True)
class _Member:
    """A task, its thread and what it waits for."""

    task: Callable[[], Any]
    world: World
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    has_ended: bool = False
    request: Any = None
    answer: Any = None
    result: Any = None
    error: BaseException | None = None


class Lockstep:
    """Runs tasks in turns. A task's number is its place among them.

    Args:
        tasks: What is to be run. One that raises ends alone.
        worlds: The global state that each begins with.
    """

    def __init__(self, tasks: Sequence[Callable[[], Any]], worlds: Sequence[World]) -> None:
        self._members = [
            _Member(task=task, world=world) for task, world in zip(tasks, worlds, strict=True)
        ]
        self._parked = threading.Semaphore(0)
        self._is_abandoned = False

    def run(self, serve: Serve) -> list[Any]:
        """Run all tasks to their ends.

        Args:
            serve: Answers what tasks ask for with `ask`, whenever none of them can go on; at least
                one each time. It runs in the caller's thread.

        Returns:
            What each task returned, or the exception that ended it.
        """
        before = World()
        waiting: dict[int, Any] = {}
        ready = list(range(len(self._members)))
        try:
            while ready:
                for number in ready:
                    self._advance(self._members[number])
                    if not self._members[number].has_ended:
                        waiting[number] = self._members[number].request
                answers = serve(waiting) if waiting else {}
                assert answers or not waiting, "nobody was answered"
                for number, answer in answers.items():
                    self._members[number].answer = answer
                    del waiting[number]
                ready = sorted(answers)
        finally:
            self._abandon()
            before.restore()
        return [member.result if member.error is None else member.error for member in self._members]

    def ask(self, number: int, request: Any) -> Any:
        """Wait for an answer; called by the task of this number.

        Raises:
            Abandoned: There will be none.
        """
        member = self._members[number]
        member.request = request
        self._parked.release()
        member.go_on.acquire()
        if self._is_abandoned:
            raise Abandoned
        answer, member.answer, member.request = member.answer, None, None
        return answer

    def _advance(self, member: _Member) -> None:
        """Let one task run until it asks or ends."""
        member.world.restore()
        if member.thread is None:
            member.thread = threading.Thread(target=self._carry_out, args=(member,), daemon=True)
            member.thread.start()
        else:
            member.go_on.release()
        self._parked.acquire()
        member.world = World()

    def _carry_out(self, member: _Member) -> None:
        try:
            member.result = member.task()
        except BaseException as error:  # whatever ends it; `run` gives it to the caller
            member.error = error
        finally:
            member.has_ended = True
            self._parked.release()

    def _abandon(self) -> None:
        """End the tasks that still wait, one after another."""
        self._is_abandoned = True
        for member in self._members:
            if member.thread is not None:
                member.go_on.release()
                member.thread.join()
