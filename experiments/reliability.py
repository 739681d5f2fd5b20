"""What is promised of runs that die, tried again and again; docs/reliability.md from what came out.

Run: make reliability (or python experiments/reliability.py [--trials N] [--seed S])

A trial is a run of `loralloc train` on a tiny model, in a process of its own that something happens
to at a random moment; then it is gone on with to its end. The end is compared with that of a run
that nothing happened to: the adapter bit for bit, rounds and logged losses equal.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked, which threads do not survive
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralloc.cli import main as loralloc
from loralloc.experiments.tiny_backbones import build
from loralloc.training.seal import newest_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

OPTIONS = {
    "lora_r": 2,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "num_rounds": 3,
    "warmup_epochs": 0.5,
    "recovery_epochs": 0.5,
    "scoring_examples": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "neftune_noise_alpha": 5,
}
"""18 steps of 6 an epoch, rounds after 3, 6 and 9, and random numbers in every step."""


@dataclass(frozen=True)
class Place:
    """Where the runs of all trials find their model and data, and how the untouched one ended."""

    root: Path
    model: str
    draw: random.Random
    whole: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def words(self, folder: Path) -> list[str]:
        """A run from its beginning, as a command line."""
        options = {**OPTIONS, "model_name_or_path": self.model, "output_dir": folder}
        given = {**options, "dataset_name": self.root / "data"}
        return ["train", *(word for name, v in given.items() for word in (f"--{name}", str(v)))]

    def go_on(self, folder: Path) -> list[str]:
        """What a person does after a run died: resume it where it can be, else begin anew."""
        if newest_whole(folder) is not None:
            return ["train", "--resume", "--output_dir", str(folder)]
        return [*self.words(folder), "--overwrite"]

    def moment(self) -> float:
        """Seconds into a run, any of them as likely as another."""
        return self.draw.uniform(0.0, self.seconds[0])


def started(words: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """A process that carries out a command line; its number."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if before is not None:
            before()
        code = loralloc(words)
    finally:
        os._exit(code)


def ended(number: int) -> int:
    """The exit code of a process, once it has ended; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def found_in(folder: Path) -> dict[str, Any]:
    """What a run came to."""
    record = json.loads((folder / "allocation.json").read_text())
    rounds = [{**entry, "seconds": None} for entry in record["rounds"]]
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "rounds": rounds,
        "losses": [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry],
        "ended": json.loads((folder / "run.json").read_text())["ended"],
    }


def difference(place: Place, folder: Path) -> str:
    """In what a run ended otherwise than the untouched one; empty where in nothing."""
    found = found_in(folder)
    return ", ".join(name for name, value in place.whole.items() if found[name] != value)


def finished(place: Place, folder: Path, log: Path) -> str:
    """Go on with a run to its end; what was wrong with that, or nothing."""
    code = ended(started(place.go_on(folder), log))
    if code:
        return f"going on ended with {code}: {_last_line(log)}"
    return difference(place, folder)


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["nothing was printed"])[-1][:300]


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
        return f"SIGTERM ended with {code}: {_last_line(log)}"
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
        return f"it ended with {code}: {_last_line(log)}"
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
        return f"they ended with {codes}: {_last_line(logs[0])}; {_last_line(logs[1])}"
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
    from reliability_together import PROMISES as TOGETHER

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30, help="of the first promise [30]")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    parser.add_argument("--only", nargs="+", help="try these by name; the rest stays as it was")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loralloc-reliability-") as root:
        place = _placed(Path(root), args.seed)
        every = (*PROMISES, *TOGETHER)
        chosen = [each for each in every if not args.only or each[0].__name__ in args.only]
        results = [_tried(place, *promise, args.trials) for promise in chosen]
    data: dict[str, Any] = {
        "command": f"python experiments/reliability.py --trials {args.trials} --seed {args.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "options": OPTIONS,
        "promises": results,
    }
    if args.only:
        before = json.loads(args.json.read_text())
        found = {entry["name"]: entry for entry in (*before["promises"], *results)}
        every = [found[each[0].__name__] for each in every if each[0].__name__ in found]
        data = {**before, "promises": every}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))
    sys.exit(any(entry["failed"] for entry in results))


def _placed(root: Path, seed: int) -> Place:
    """The model, the data, and the run that nothing happens to."""
    (root / "data").mkdir()
    for name, count in (("train", 24), ("validation", 8)):
        rows = [{"prompt": f"the film {n} is", "completion": " good"} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "data" / f"{name}.jsonl").write_text(text)
    place = Place(root, build("tiny-llama", root / "models"), random.Random(seed))
    for _ in range(2):  # the first one fills caches
        begin = time.monotonic()
        code = ended(started([*place.words(root / "whole"), "--overwrite"], root / "whole.log"))
        place.seconds[:] = [time.monotonic() - begin]
        if code:
            raise SystemExit((root / "whole.log").read_text())
    place.whole.update(found_in(root / "whole"))
    _say(f"the run that nothing happens to takes {place.seconds[0]:.1f} s")
    return place


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
            _say(f"{trial.__name__}, {failed[-1]}")
        shutil.rmtree(folder, ignore_errors=True)
    _say(f"{trial.__name__}: {count} tried, {len(failed)} failed")
    return {
        "name": trial.__name__,
        "promise": says.replace("…", "nothing had happened."),
        "how": " ".join((trial.__doc__ or "").split()),
        "tried": count,
        "failed": failed,
        "seconds": round(time.monotonic() - begin, 1),
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()  # before a fork, or the child writes it too


def page(data: dict[str, Any]) -> str:
    """docs/reliability.md."""
    lines = [
        "# What is promised of runs that die",
        "",
        "Written by `make reliability` from `experiments/results/reliability.json`; not by hand.",
        "",
        f"`{data['command']}` on a machine of",
        f"{data['machine']}: every trial is",
        "a whole run of `loralloc train` (a Llama of two blocks, 18 steps, three rounds, noise in",
        "the embeddings) in a process of its own. Its end counts as the same where the adapter is",
        "equal bit for bit, and all rounds and logged losses are.",
        "",
        "| promise | how it is tried | tried | failed |",
        "|---|---|---:|---:|",
    ]
    for entry in data["promises"]:
        failed = len(entry["failed"])
        lines.append(f"| {entry['promise']} | {entry['how']} | {entry['tried']} | {failed} |")
    failures = [f"- {e['name']}, {fault}" for e in data["promises"] for fault in e["failed"]]
    lines += ["", *(["What failed:", "", *failures] if failures else ["Nothing failed."]), ""]
    lines += [
        "The rest of what is said of resuming is held by tests (`pytest -m reliability`):",
        "checkpoints before, between, after and in the step of a round, of every method.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
