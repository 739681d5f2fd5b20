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


def fail():
    raise ValueError("The second process has had enough.")


def break_down():
    raise KeyError("a bug of ours")


HAPPENS = {
    "fails": fail,
    "breaks": break_down,
    "is asked to stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "is interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
}
"""What may happen to a process."""


@dataclass(kw_only=True)
class AtStep3(Lora):
    """LoRA in which something happens after the third step, in the second process or in all."""

    what: str = "fails"
    in_all: bool = False

    def step(self, number):
        if number == 3 and (self.in_all or os.environ.get("RANK") == "1"):
            HAPPENS[self.what]()


METHOD = f"{__name__}:{AtStep3.__name__}"


def with_method(where: Path, what: str, *more) -> dict:
    words = ("--method", METHOD, "--method.what", what, *more)
    return train(where, *words, "--save_strategy", "steps", "--save_steps", 2, rounds=())


def goes_on(where: Path) -> dict:
    return loralloc("train", "--resume", "--output_dir", where, "--method", METHOD)


def broken(where: Path) -> dict:
    try:
        return with_method(where, "breaks")
    except KeyError as error:
        return {"code": 1, "err": repr(error), "out": ""}


def locked(where: Path) -> dict:
    with folder.locked(where) if os.environ.get("RANK") == "0" else nullcontext():
        return train(where)


def checks(folder: Path | None) -> dict:
    folder = folder or Path()
    return {
        "one fails": lambda: with_method(folder / "fails", "fails"),
        "one breaks": lambda: broken(folder / "breaks"),
        "one is asked to stop": lambda: with_method(folder / "stops", "is asked to stop"),
        "goes on": lambda: goes_on(folder / "stops"),
        "all are interrupted": lambda: with_method(
            folder / "interrupted", "is interrupted", "--method.in_all", True
        ),
        "a refusal": lambda: train(folder / "refused", "--lora_r", 0, rounds=()),
        "an unknown flag": lambda: train(folder / "refused", "--lora_rr", 2, rounds=()),
        "a locked folder": lambda: locked(folder / "locked"),
        "another verb": lambda: loralloc("tasks"),
        "a dry run": lambda: train(folder / "dry", "--dry-run"),
        "sharding": lambda: train(folder / "sharded", "--fsdp", "full_shard", rounds=ROUNDS),
    }
