"""Several processes on this machine; one that dies costs only the cell that it was at."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.executors.worker import from_data
from loralloc.experiments.work import Outcome, finished

COMMAND = (sys.executable, "-m", "loralloc.experiments.executors.worker")


def run(cells: Sequence[Cell], resources: Resources) -> Iterator[Outcome]:
    """See `Executor`."""
    left: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    num_left = 0
    for cell in cells:
        result = finished(cell)  # without a process for what needs none
        if result is not None:
            yield Outcome(cell=cell, result=result, ran=False)
        else:
            left.put(cell)
            num_left += 1
    workers = [_Worker(resources) for _ in range(min(resources.workers, num_left))]
    threads = [
        threading.Thread(target=worker.serve, args=(left, done), daemon=True) for worker in workers
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(num_left):
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()


@dataclass
class _Worker:
    """One process, started when it is first needed and again when it has died."""

    resources: Resources
    process: Any = None
    stopped: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def serve(
        self,
        left: queue.SimpleQueue[Cell],
        done: queue.SimpleQueue[Outcome | BaseException],
    ) -> None:
        """Take cells until there are none."""
        try:
            while not self.stopped:
                try:
                    cell = left.get_nowait()
                except queue.Empty:
                    return
                outcome = self._carry_out(cell)
                if outcome is not None:
                    done.put(outcome)
        except BaseException as error:
            done.put(error)
        finally:
            self._end()

    def stop(self) -> None:
        """Take no more cells, and end what runs now."""
        with self.lock:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.kill()

    def _carry_out(self, cell: Cell) -> Outcome | None:
        for _ in range(1 + self.resources.retries):
            if cell.alone:
                self._end()
            answer = self._ask(cell)
            if cell.alone:
                self._end()
            if self.stopped:
                return None
            if answer:
                return from_data(cell, json.loads(answer))
            code = self._end()
        reason = f"its process ended with exit code {code}, {1 + self.resources.retries} times"
        return Outcome(cell=cell, result=None, failure=reason)

    def _ask(self, cell: Cell) -> str:
        """The worker's answer; empty where it died."""
        with self.lock:
            if self.stopped:
                return ""
            if self.process is None:
                self.process = self._start()
        try:
            self.process.stdin.write(json.dumps(cell.as_data()) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return ""
        return str(self.process.stdout.readline())

    def _start(self) -> Any:
        environment = dict(os.environ)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // self.resources.workers)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def _end(self) -> int | None:
        """Let the process end, and return its exit code."""
        if self.process is None:
            return None
        with self.lock:
            process, self.process = self.process, None
        process.stdin.close()
        code = process.wait()
        process.stdout.close()
        return int(code)
