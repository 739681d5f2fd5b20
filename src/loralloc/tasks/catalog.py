"""The tasks by name."""

from __future__ import annotations

import difflib

from loralloc.tasks.demo import DEMO
from loralloc.tasks.e2e import E2E
from loralloc.tasks.sst2 import SST2
from loralloc.tasks.task import Task

TASKS: dict[str, Task] = {"sst2": SST2, "e2e": E2E, "demo": DEMO}


def get_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        ValueError: If there is none; the message suggests the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise ValueError(f"There is no task '{name}'{hint}; the tasks are {', '.join(TASKS)}.")
