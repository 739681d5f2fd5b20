"""Runs that something happens to: what all trials of reliability begin with and end in."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked, which threads do not survive
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralloc.cli import main as loralloc
from loralloc.experiments.tiny_backbones import build
from loralloc.runs.folder import SETTINGS
from loralloc.training.seal import newest_whole

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
        has_settings = (folder / SETTINGS).is_file()  # or the command says that there is no run
        if has_settings and newest_whole(folder) is not None:
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
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
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
        return f"going on ended with {code}: {last_line(log)}"
    return difference(place, folder)


def last_line(log: Path) -> str:
    """The last of what a process printed."""
    return (log.read_text().strip().splitlines() or ["nothing was printed"])[-1][:300]


def placed(root: Path, draw: random.Random) -> Place:
    """The model, the data, and the run that nothing happens to."""
    (root / "data").mkdir()
    for name, count in (("train", 24), ("validation", 8)):
        rows = [{"prompt": f"the film {n} is", "completion": " good"} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "data" / f"{name}.jsonl").write_text(text)
    place = Place(root, build("tiny-llama", root / "models"), draw)
    for _ in range(2):  # the first one fills caches
        begin = time.monotonic()
        code = ended(started([*place.words(root / "whole"), "--overwrite"], root / "whole.log"))
        place.seconds[:] = [time.monotonic() - begin]
        if code:
            raise SystemExit((root / "whole.log").read_text())
    place.whole.update(found_in(root / "whole"))
    say(f"the run that nothing happens to takes {place.seconds[0]:.1f} s")
    return place


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()  # before a fork, or the child writes it too
