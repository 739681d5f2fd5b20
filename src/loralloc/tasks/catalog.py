"""The tasks by name."""

from __future__ import annotations

import difflib

from loralloc.tasks.alpaca import ALPACA
from loralloc.tasks.boolq import BOOLQ
from loralloc.tasks.copa import COPA
from loralloc.tasks.demo import DEMO
from loralloc.tasks.e2e import E2E
from loralloc.tasks.mt_bench import MT_BENCH
from loralloc.tasks.qnli import QNLI
from loralloc.tasks.record import RECORD
from loralloc.tasks.rte import RTE
from loralloc.tasks.squad import SQUAD
from loralloc.tasks.sst2 import SST2
from loralloc.tasks.task import Task

TASKS: dict[str, Task] = {
    "sst2": SST2,
    "rte": RTE,
    "qnli": QNLI,
    "boolq": BOOLQ,
    "copa": COPA,
    "record": RECORD,
    "squad": SQUAD,
    "e2e": E2E,
    "alpaca": ALPACA,
    "mt_bench": MT_BENCH,
    "demo": DEMO,
}


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
