"""What is promised of runs that die, tried again and again; docs/reliability.md from what came out.

Run: make reliability (or python experiments/reliability.py [--trials N] [--seed S] [--only NAME])

A trial is a run of `loralloc train` on a tiny model, in a process of its own that something happens
to at a random moment; then it is gone on with to its end. The end is compared with that of a run
that nothing happened to: the adapter bit for bit, rounds and logged losses equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import PROMISES as OF_THE_MACHINE
from reliability_page import PAGE, RESULTS, page
from reliability_together import PROMISES as TOGETHER
from trials import OPTIONS, Place, difference, ended, finished, last_line, placed, say, started

from loralloc.training.seal import newest_whole


def killed(place: Place, folder: Path, log: Path) -> str:
    """SIGKILL, as many as three times in one run."""
    words = place.words(folder)
    for _ in range(place.draw.randint(1, 3)):
        number = started(words, log)
        time.sleep(place.moment())
        os.kill(number, signal.SIGKILL)
        ended(number)
        words = place.go_on(folder)
    return finished(place, folder, log)


def preempted(place: Place, folder: Path, log: Path) -> str:
    """SIGTERM: exits with 0 and a line, unless it came before training or after it."""
    number = started(place.words(folder), log)
    time.sleep(place.moment())
    os.kill(number, signal.SIGTERM)
    code = ended(number)
    if code == -signal.SIGTERM:  # before training began
        return finished(place, folder, log)
    if code:
        return f"SIGTERM ended with {code}: {last_line(log)}"
    if json.loads((folder / "run.json").read_text())["ended"]:
        return difference(place, folder)
    if "as asked" not in log.read_text():
        return "it stopped without a line that says so"
    return finished(place, folder, log)


def full_disk(place: Place, folder: Path, log: Path) -> str:
    """No file may grow beyond a random size, which stands in for a disk without room."""

    def without_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = int(2 ** place.draw.uniform(8, 17))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    code = ended(started(place.words(folder), log, without_room))
    if code not in (0, 2):
        return f"it ended with {code}: {last_line(log)}"
    return finished(place, folder, log)


def changed(place: Place, folder: Path, log: Path) -> str:
    """One bit of a checkpoint flipped, or a file of it cut short, after a kill."""
    number = started(place.words(folder), log)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("checkpoint-*/files.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(number, signal.SIGKILL)
    ended(number)
    newest = newest_whole(folder)
    if newest is None:
        return "no checkpoint was whole"
    path = place.draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    if place.draw.random() < 0.5:
        del content[place.draw.randrange(len(content)) :]
    else:
        content[place.draw.randrange(len(content))] ^= 1 << place.draw.randrange(8)
    path.write_bytes(content)
    if newest_whole(folder) == newest and path.name != "files.json":
        return f"a changed {path.name} was taken for whole"
    return finished(place, folder, log)


def together(place: Place, folder: Path, log: Path) -> str:
    """Two processes begin in one folder within 0.4 seconds: one trains, the other says why not."""
    logs = log, log.with_suffix(".second")
    numbers = [started(place.words(folder), logs[0])]
    time.sleep(place.draw.uniform(0, 0.4))
    numbers.append(started(place.words(folder), logs[1]))
    codes = sorted(ended(number) for number in numbers)
    if codes != [0, 2]:
        return f"they ended with {codes}: {last_line(logs[0])}; {last_line(logs[1])}"
    return difference(place, folder)


def not_ours(place: Place, folder: Path, log: Path) -> str:
    """A folder with somebody else's files under names of a run, with and without `--overwrite`."""
    names = ("README.md", "checkpoint-500/a", "eval/a", "settings.json", "answers.jsonl")
    for name in place.draw.sample(names, place.draw.randint(1, len(names))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = place.draw.choice([[], ["--overwrite"]])
    code = ended(started([*place.words(folder), *more], log))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if code != 2:
        return f"it ended with {code}"
    return "" if after == before else "files were changed"


def replaced(place: Place, folder: Path, log: Path) -> str:
    """A finished run whose replacement is killed: it is still there, whole."""
    ended(started(place.words(folder), log))
    number = started([*place.words(folder), "--overwrite"], log)
    time.sleep(place.moment())
    os.kill(number, signal.SIGKILL)
    ended(number)
    where = folder / "replaced" if (folder / "replaced" / "run.json").is_file() else folder
    first = difference(place, where)
    return first and f"of the finished run: {first}"


PROMISES: tuple[tuple[Callable[[Place, Path, Path], str], str, float], ...] = (
    (killed, "A run that is killed (`kill -9`) goes on as if nothing had happened.", 1.0),
    (preempted, "SIGTERM lets the step end, saves, exits with 0; the run goes on as if …", 0.5),
    (full_disk, "A full disk ends a run in a sentence, and what was saved is gone on from.", 0.5),
    (changed, "A checkpoint with a flipped bit or a file cut short is not gone on from.", 0.5),
    (together, "Two processes never train in one folder.", 0.3),
    (not_ours, "Nothing is deleted or written over that no run wrote.", 0.3),
    (replaced, "A finished run stays until the one that replaces it has ended.", 0.3),
)
"""What is tried, what is promised, and the share of `--trials` that it gets."""


def main() -> None:
    """Try every promise, write what came out and the page."""
    every = (*PROMISES, *OF_THE_MACHINE, *TOGETHER)
    names = [trial.__name__ for trial, *_ in every]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30, help="of the first promise [30]")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--only", nargs="+", choices=names, help="try these, the rest stays")
    args = parser.parse_args()
    data: dict[str, Any] = {
        "command": f"python experiments/reliability.py --trials {args.trials} --seed {args.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "options": OPTIONS,
        "promises": [],
    }
    if args.only:
        data = json.loads(args.json.read_text())
    with tempfile.TemporaryDirectory(prefix="loralloc-reliability-") as root:
        place = placed(Path(root), random.Random(args.seed))
        for trial, *promise in every:
            if args.only is None or trial.__name__ in args.only:
                _put(data["promises"], _tried(place, trial, *promise, args.trials))
    data["promises"].sort(key=lambda entry: names.index(entry["name"]))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page())
    sys.exit(any(entry["failed"] for entry in data["promises"]))


def _put(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Put a result in the place of an earlier one of the same promise."""
    results[:] = [entry for entry in results if entry["name"] != result["name"]] + [result]


def _tried(
    place: Place, trial: Callable[[Place, Path, Path], str], says: str, share: float, trials: int
) -> dict[str, Any]:
    count, failed = max(1, round(share * trials)), []
    begin = time.monotonic()
    for number in range(count):
        folder = place.root / trial.__name__ / str(number)
        folder.parent.mkdir(exist_ok=True)
        fault = trial(place, folder, folder.with_suffix(".log"))
        if fault:
            failed.append(f"trial {number}: {fault.replace(str(place.root), '...')}")
            say(f"{trial.__name__}, {failed[-1]}")
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{trial.__name__}: {count} tried, {len(failed)} failed")
    return {
        "name": trial.__name__,
        "promise": says.replace("…", "nothing had happened."),
        "how": " ".join((trial.__doc__ or "").split()),
        "tried": count,
        "failed": failed,
        "seconds": round(time.monotonic() - begin, 1),
    }


if __name__ == "__main__":
    main()
