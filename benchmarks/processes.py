"""Contestants in processes of their own, by turns: in each only one computes.

A machine that slows down slows all of them, and the peak memory of each is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name")

WAITING = "waiting"
"""What a run answers when a turn is over; its last answer is JSON."""

SHORT = {"max_steps": 4, "num_rounds": 1, "warmup_epochs": 0.005, "recovery_epochs": 0.01}

MAP_LARGE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""glibc keeps freed blocks in its heap, and with batches of changing lengths the holes grow step by
step. Mapped blocks go back at once, so that the peak is what was held."""


def begin(
    contestant: str,
    task: str,
    data: str,
    model: str,
    options: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start `whole_run.py`, and wait until it is ready for its first turn."""
    script = Path(__file__).with_name("whole_run.py")
    run = subprocess.Popen(
        [sys.executable, str(script), contestant, task, data, model, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    _answer(run)
    return run


def finish(runs: Mapping[Name, subprocess.Popen[str]]) -> dict[Name, dict[str, Any]]:
    """Give turns until all are through.

    Returns:
        What each run printed last.
    """
    results: dict[Name, dict[str, Any]] = {}
    while len(results) < len(runs):
        for name, run in runs.items():
            if name in results:
                continue
            print(file=run.stdin, flush=True)
            answer = _answer(run)
            if answer != WAITING:
                results[name] = json.loads(answer)
    return {name: results[name] for name in runs}


def peak_bytes(contestant: str, task: str, data: str) -> int:
    """Peak memory held in a short run with a round in it; its longest batch comes first."""
    run = begin(contestant, task, data, "smollm2-135m", SHORT, environment=MAP_LARGE_BLOCKS)
    return int(finish({contestant: run})[contestant]["peak_bytes"])


def _answer(run: subprocess.Popen[str]) -> str:
    """The next line of a run.

    Raises:
        RuntimeError: It ended without one; its own message stands above.
    """
    for line in run.stdout or ():
        return line.strip()
    raise RuntimeError(f"{run.args} ended with exit code {run.wait()} before it was through.")
