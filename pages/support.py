"""Writes docs/support.md from the methods and what ran where: python pages/support.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import TaskType

from loralloc import get_method
from loralloc.methods.catalog import METHODS
from loralloc.methods.method import Method
from loralloc.methods.peft_method import LoraShaped, PeftMethod
from loralloc.runs.fleet import METHODS as FLEET
from loralloc.training.way_of_running import acts_between_steps

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "experiments" / "results" / "releases.json"

HEAD = """\
# What runs where

Written by `make pages` from the methods, as the code has them, and from
`experiments/results/releases.json`; not by hand.

## Methods

| method | heads | saved as | merges | fp16 | quantised backbone | in a fleet |
|---|---|---|---|---|---|---|
"""
HEADS = {
    TaskType.CAUSAL_LM: "text",
    TaskType.SEQ_CLS: "labels",
    TaskType.QUESTION_ANS: "spans",
}
NOTES = """
- **heads**: what it is for: text (a causal language model), labels (a classifier), spans (answers
  cut out of a text).
- **saved as**: LoRA opens with stock PEFT as an ordinary adapter; PEFT with stock PEFT in its own
  form; own with `loralloc.open_adapter`.
- **fp16**: whether `fp16=True` is accepted.
- **quantised backbone**: whether weights in 8 or 4 bits (bitsandbytes) are accepted below it. Of
  the scores `ablation` is refused there, but for 4 bits that compute in float32.
- **in a fleet**: whether runs of it [train at once](fleet.md) on one backbone.

What does not go is refused at the start of a run, in a sentence. What holds the rest:

"""
HELD = {
    "every method on backbones like Llama, GPT-2 and RoBERTa: it learns, is saved, opened, merged "
    "and resumed": ("methods/test_every_method.py",),
    "every method in a `transformers.Trainer` that loralloc did not build": (
        "training/test_driver_in_a_users_trainer.py",
    ),
    "ALoRA in TRL's trainers: SFT, DPO, reward; GRPO by `sensitivity` only": (
        "training/test_own_loss.py",
        "test_docs.py",
    ),
    "the recipes, beginning with [TRL](recipes/trl.md)": ("recipes/test_recipes.py",),
    "ALoRA in a plain loop": ("allocation/test_allocator.py",),
    "mixed precision, bfloat16 backbones": (
        "training/test_mixed_precision.py",
        "allocation/test_precision.py",
    ),
    "LoRA on quantised weights computes what PEFT's does": ("kernels/test_lora_quantised.py",),
    "[quantised backbones](quantised.md): trained, scored, resized, saved, resumed, opened": (
        "training/test_attach_quantised.py",
        "cli/test_train_quantised.py",
    ),
    "whatever else trains beside the ranks, and other adapters": (
        "training/test_attach_beside.py",
    ),
    "compiled models": ("training/test_compiled.py",),
    "[several processes](distributed.md) that each have the whole model": (
        "processes/test_trained_together.py",
    ),
    "a backbone that no process has whole (FSDP2)": ("processes/test_sharded.py",),
    "fp16, FSDP, DeepSpeed, a model over several devices: refused where they do not go": (
        "training/test_attach.py",
        "training/test_driver_in_a_users_trainer.py",
    ),
    "fleets": ("runs/test_fleet.py",),
}
"""What is said to work, and the tests that would fail if it did not."""

VERSIONS = """
These run on CPUs.

## Versions

`python experiments/releases.py suite NAME PYTHON` ran the tests with each of these interpreters, on
Linux, on a CPU: all of them (`make test`), or the quick selection (`--quick`: `make test-quick`).

"""


def page() -> str:
    """The whole page."""
    rows = "".join(_row(name, get_method(name)) for name in METHODS)
    return HEAD + rows + NOTES + _held() + VERSIONS + _versions()


def _row(name: str, kind: type[Method]) -> str:
    saved = "own"
    if issubclass(kind, PeftMethod):
        saved = "LoRA" if issubclass(kind, LoraShaped) else "PEFT"
    cells = [
        f"`{name}`",
        ", ".join(HEADS[task] for task in kind.about.task_types),
        saved,
        _word(kind.about.merges),
        _word(kind().bears_scaled_loss() or not acts_between_steps(kind())),
        _word(issubclass(kind, PeftMethod)),
        _word(name in FLEET),
    ]
    return f"| {' | '.join(cells)} |\n"


def _word(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _held() -> str:
    rows = (
        f"| {what} | {', '.join(f'`tests/{test}`' for test in tests)} |\n"
        for what, tests in HELD.items()
    )
    return "| what | held by |\n|---|---|\n" + "".join(rows)


def _versions() -> str:
    """What ran with which versions."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    packages = list(next(iter(runs.values()))["versions"])
    lines = [
        f"| run | Python | {' | '.join(packages)} | tests | passed | skipped | failed |",
        "|---" * (len(packages) + 6) + "|",
    ]
    for name, run in runs.items():
        versions = " | ".join(run["versions"][package] for package in packages)
        counts = " | ".join(str(run[count]) for count in ("tests", "passed", "skipped", "failed"))
        lines.append(f"| {name} | {run['python']} | {versions} | {counts} |")
    notes = [f"- {name}: {_note(run)}" for name, run in runs.items() if _note(run)]
    return "\n".join([*lines, "", *notes, ""]) if notes else "\n".join([*lines, ""])


def _note(run: Mapping[str, Any]) -> str:
    """What is to be known of a run."""
    number = len(run.get("run_again", ()))
    mended = (
        f"{number} tests failed at first, and passed once what they had found was mended, or the "
        "data that they want was named."
    )
    return " ".join(filter(None, (run["note"], mended if number else "")))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
