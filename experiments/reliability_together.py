"""What is promised of two processes that train together; tried by `experiments/reliability.py`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials import Place, ended, found_in, started

from loralloc.runs.folder import has_ended

NUMBER = 2
PATIENCE_S = 60.0
"""How long the other process may take to notice."""


def both(words: list[str], log: Path) -> list[int]:
    """Two processes that carry out a command line together; their numbers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    shared = {"WORLD_SIZE": NUMBER, "LOCAL_WORLD_SIZE": NUMBER, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    if sys.platform == "linux":  # or gloo looks up the machine's own name
        shared["GLOO_SOCKET_IFNAME"] = "lo"

    def as_number(index: int) -> Callable[[], None]:
        own = {**shared, "RANK": index, "LOCAL_RANK": index}
        return lambda: os.environ.update({name: str(value) for name, value in own.items()})

    return [started(words, log, as_number(index)) for index in range(NUMBER)]


def end(numbers: list[int]) -> list[int]:
    """The exit codes of processes; as a launcher does, SIGTERM to the others where one fails."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(numbers):
        for number in [number for number in numbers if number not in codes]:
            if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                codes[number] = ended(number)
            elif time.monotonic() > deadline:
                os.kill(number, signal.SIGKILL)
        if any(codes.values()) and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE_S
            for number in [number for number in numbers if number not in codes]:
                os.kill(number, signal.SIGTERM)
        time.sleep(0.02)
    if time.monotonic() > deadline:
        raise TimeoutError(f"a process went on for {PATIENCE_S:.0f} s after another had failed")
    return [codes[number] for number in numbers]


def untouched(place: Place) -> dict[str, Any]:
    """What two processes come to that nothing happens to."""
    folder, log = place.root / "together", place.root / "together.log"
    if not folder.exists() and any(end(both(place.words(folder), log))):
        raise SystemExit(log.read_text())
    return found_in(folder)


def gone_on(place: Place, folder: Path, log: Path) -> str:
    """Go on with both to the end; in what it is another than the untouched one's, or nothing."""
    codes = [] if has_ended(folder) else end(both(place.go_on(folder), log))
    if any(codes):
        return f"going on ended with {codes}: {log.read_text().strip().splitlines()[-1][:300]}"
    found = found_in(folder)
    return ", ".join(name for name, value in untouched(place).items() if found[name] != value)


def signalled(which: signal.Signals, place: Place, folder: Path, log: Path) -> list[int]:
    """How two processes ended of which one got a signal at some moment.

    Raises:
        TimeoutError: The other went on after that one had failed.
    """
    untouched(place)
    numbers = both(place.words(folder), log)
    time.sleep(place.moment())
    os.kill(place.draw.choice(numbers), which)
    return end(numbers)


def one_killed(place: Place, folder: Path, log: Path) -> str:
    """SIGKILL to one of two processes: the other ends by itself, and both go on."""
    try:
        signalled(signal.SIGKILL, place, folder, log)
    except TimeoutError as error:
        return str(error)
    if "transport/" in log.read_text():
        return "what a socket said was shown"
    return gone_on(place, folder, log)


def one_stopped(place: Place, folder: Path, log: Path) -> str:
    """SIGTERM to one of two processes: both save and exit with 0, or had not begun to train."""
    try:
        codes = signalled(signal.SIGTERM, place, folder, log)
    except TimeoutError as error:
        return str(error)
    if -signal.SIGTERM not in codes and any(codes):
        return f"they ended with {codes}"
    return gone_on(place, folder, log)


PROMISES = (
    (one_killed, "Two processes of which one is killed both end, and go on as if …", 0.3),
    (one_stopped, "Two processes of which one gets SIGTERM both save, and go on as if …", 0.3),
)
"""What is tried, what is promised, and the share of `--trials` that it gets."""
