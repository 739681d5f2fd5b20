"""What a machine may do to a run: fill its disk, forbid or take away its folder, set its clock."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trials import Place, difference, ended, finished, last_line, started

from loralloc.training import seal as sealing

ROOM_BYTES = 2**26
"""Of a disk that a run has room on."""

DAY_S = 86400.0


def small_disk(place: Place, folder: Path, log: Path) -> str:
    """A file system in memory of a random size, which is made larger before the run goes on."""
    with _mounted(folder, int(2 ** place.draw.uniform(13, 19))):
        code = ended(started(place.words(folder), log))
        if code not in (0, 2):
            return f"it ended with {code}: {last_line(log)}"
        if code and "space" not in last_line(log):
            return f"it does not say why: {last_line(log)}"
        _mount("-o", f"remount,size={ROOM_BYTES}", str(folder))
        return finished(place, folder, log)


def read_only(place: Place, folder: Path, log: Path) -> str:
    """The folder becomes read-only at a random moment, and may be written again later."""
    number = started(place.words(folder), log)
    time.sleep(place.moment())
    folder.mkdir(exist_ok=True)
    # A second mount over the first: files that are open do not keep it from being read-only.
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))
    code = ended(number)
    subprocess.run(["umount", str(folder)], check=True)
    if code not in (0, 2):
        return f"it ended with {code}: {last_line(log)}"
    return finished(place, folder, log)


def deleted(place: Place, folder: Path, log: Path) -> str:
    """The folder is deleted at a random moment; the run says so, and begins anew."""
    number = started(place.words(folder), log)
    time.sleep(place.moment())
    is_over = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    for _ in range(3):  # the run may be writing into it
        with suppress(OSError):
            shutil.rmtree(folder)
    code = ended(number)
    if code not in (0, 2):
        return f"it ended with {code}: {last_line(log)}"
    if code == 0 and not is_over and not (folder / "run.json").is_file():
        return "it ended as if its folder were there"
    return finished(place, folder, log)


def clock(place: Place, folder: Path, log: Path) -> str:
    """Every time that is asked for is up to ten days off, and so are those of checkpoints."""
    draw = random.Random(place.draw.random())
    now = time.time

    def jumping() -> float:
        return now() + draw.uniform(-10, 10) * DAY_S

    def before() -> None:
        time.time = jumping
        own = sealing.seal

        def seal(checkpoint: Path) -> None:
            own(checkpoint)
            os.utime(checkpoint, (jumping(), jumping()))

        sealing.seal = seal

    code = ended(started(place.words(folder), log, before))
    if code:
        return f"it ended with {code}: {last_line(log)}"
    kept = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    if kept != [16, 18]:
        return f"of the checkpoints, those of the steps {kept} were kept"
    return difference(place, folder)


PROMISES: tuple[tuple[Callable[[Place, Path, Path], str], str, float], ...] = (
    (small_disk, "A file system without room ends a run in a sentence that says so.", 0.5),
    (read_only, "A folder that may not be written ends a run in a sentence, and loses none.", 0.3),
    (deleted, "A folder that is deleted under a run ends it in a sentence.", 0.3),
    (clock, "A clock that jumps changes nothing, and the newest checkpoints stay.", 0.3),
)
"""As those of `reliability.py`."""


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
