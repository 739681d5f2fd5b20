"""How runs end in `test_ends_together.py`, where one of two processes fails or is asked to stop."""

import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from run_together import ROUNDS, loralloc, train

from loralloc.methods.lora import Lora
from loralloc.runs import folder

APART = True


@dataclass(kw_only=True)
class AtStep3(Lora):
    """LoRA in which something happens in the second process, after the third step."""

    def step(self, number):
        if number == 3 and os.environ.get("RANK") == "1":
            self.happens()

    def happens(self):
        raise NotImplementedError


@dataclass(kw_only=True)
class Fails(AtStep3):
    def happens(self):
        raise ValueError("The second process has had enough.")


@dataclass(kw_only=True)
class Breaks(AtStep3):
    def happens(self):
        raise KeyError("a bug of ours")


@dataclass(kw_only=True)
class IsAskedToStop(AtStep3):
    def happens(self):
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(kw_only=True)
class IsInterrupted(AtStep3):
    def step(self, number):
        if number == 3:  # a launcher hands it on to all
            os.kill(os.getpid(), signal.SIGINT)


def with_method(kind: type, where: Path) -> dict:
    more = ("--method", f"ends_together:{kind.__name__}", "--save_strategy", "steps")
    return train(where, *more, "--save_steps", 2, rounds=())


def goes_on(where: Path) -> dict:
    method = f"ends_together:{IsAskedToStop.__name__}"
    return loralloc("train", "--resume", "--output_dir", where, "--method", method)


def broken(where: Path) -> dict:
    try:
        return with_method(Breaks, where)
    except KeyError as error:
        return {"code": 1, "err": repr(error), "out": ""}


def locked(where: Path) -> dict:
    with folder.locked(where) if os.environ.get("RANK") == "0" else nullcontext():
        return train(where)


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {
        "one fails": lambda: with_method(Fails, folder / "fails"),
        "one breaks": lambda: broken(folder / "breaks"),
        "one is asked to stop": lambda: with_method(IsAskedToStop, folder / "stops"),
        "goes on": lambda: goes_on(folder / "stops"),
        "all are interrupted": lambda: with_method(IsInterrupted, folder / "interrupted"),
        "a refusal": lambda: train(folder / "refused", "--lora_r", 0, rounds=()),
        "an unknown flag": lambda: train(folder / "refused", "--lora_rr", 2, rounds=()),
        "a locked folder": lambda: locked(folder / "locked"),
        "another verb": lambda: loralloc("tasks"),
        "a dry run": lambda: train(folder / "dry", "--dry-run"),
        "sharding": lambda: train(folder / "sharded", "--fsdp", "full_shard", rounds=ROUNDS),
    }
