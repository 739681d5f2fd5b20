"""Writes docs/support.md from the methods and what ran where: python pages/support.py."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import TaskType

from loralloc import get_method
from loralloc.methods.alora import Alora
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

"""
COLUMNS = (
    *("method", "saved as", "merges", "fp16", "quantised"),
    *("several", "in parts", "`follow`", "fleet"),
)
HEADS = {
    TaskType.CAUSAL_LM: "text (a causal language model)",
    TaskType.SEQ_CLS: "labels (a classifier)",
    TaskType.QUESTION_ANS: "spans (answers cut out of a text)",
}
NOTES = """
- **saved as**: LoRA opens with stock PEFT as an ordinary adapter; PEFT with stock PEFT in its own
  form; own with `loralloc.open_adapter`.
- **fp16**: whether `fp16=True` is accepted.
- **quantised**: whether a backbone in 8 or 4 bits ([bitsandbytes](quantised.md)) is accepted below
  it. Of the scores `ablation` is refused there, but for 4 bits that compute in float32.
- **several**: whether [several processes](distributed.md) that each have the whole model train it.
- **in parts**: whether it trains on a backbone that no process has whole
  ([FSDP2](distributed.md#a-backbone-that-no-process-holds-whole)).
- **`follow`**: whether [a loop of your own](recipes/loops.md) can have it, without a `Trainer`.
- **fleet**: whether runs of it [train at once](fleet.md) on one backbone.

All of them train in `loralloc train` and, by `drive`, in a `transformers.Trainer`, on backbones
like Llama and GPT-2 (text) and RoBERTa (labels). What is not tried is not refused either, and no
test does it. What does not go is refused at the start of a run, in a sentence.

## Trainers

Where ALoRA's rounds take place, and what was tried.

"""
IN_PARTS = ("alora", "alora-sensi")
"""Methods that a test trains on a backbone in parts."""

FOLLOWED = ("alora", "alora-sensi", "random", "inverse")
"""Methods that are an `AllocationConfig` of `follow`'s."""

OWN_WEIGHTS = ("bitfit", "full")
"""Methods that train parameters of the backbone itself, which are parts there."""

WHERE = ("trainer", "begun by", "one process", "several (DDP)", "in parts (FSDP2)", "4 or 8 bits")
TRIED, NOT, NO = "tried", "not tried", "refused"
TRAINERS = {
    "`loralloc train`": ("itself", TRIED, TRIED, "no such option", TRIED),
    "`transformers.Trainer`": ("`attach`, `drive`", TRIED, TRIED, TRIED, TRIED),
    "[SFT](recipes/trl.md#sft) of TRL": ("`attach`", TRIED, TRIED, NOT, TRIED),
    "[DPO](recipes/trl.md#dpo), [KTO](recipes/trl.md#kto), [reward](recipes/trl.md#reward-models) "
    "of TRL": ("`attach`", TRIED, NOT, NOT, NOT),
    "[GRPO](recipes/trl.md#grpo) of TRL, score `sensitivity`": ("`attach`", TRIED, NOT, NOT, NOT),
    "[sentence-transformers](recipes/trainers.md)": ("`attach`", TRIED, NOT, NOT, NOT),
    "loops of [PyTorch](recipes/loops.md#pytorch), [Accelerate](recipes/loops.md#accelerate), "
    "[Lightning](recipes/loops.md#lightning)": ("`follow`", TRIED, NO, NO, NOT),
    "[Optuna](recipes/searches.md#optuna), [Ray Train](recipes/searches.md#ray-train), with SFT": (
        *("`attach`", TRIED, NOT, NOT, NOT),
    ),
    "[Unsloth](recipes/others.md#unsloth)": ("`attach`", "by hand, no test", NOT, NOT, NOT),
    "[Axolotl](recipes/others.md#axolotl)": ("a plugin", NOT, NOT, NOT, NOT),
    "[LLaMA-Factory](recipes/others.md#llama-factory)": ("-", "cannot be installed beside it")
    + ("-",) * 3,
}
"""Each trainer, what begins allocation in it, and the ways of running that were tried; `HELD` names
the tests."""

HELD_HEAD = """
Accelerate's FSDP, DeepSpeed and a model over several devices are refused in all of them. Several
processes were tried on a CPU (gloo). Backbones for ALoRA are those above and mixtures of experts
([guide](guide.md#models)). What holds all this:

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
    "ALoRA in a plain loop": ("allocation/test_allocator.py", "training/test_follow.py"),
    "experts that are one parameter": ("training/test_attach_experts.py",),
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
        "processes/test_methods_together.py",
        "processes/test_run_together.py",
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
    methods = _table(COLUMNS, [_row(name, get_method(name)) for name in METHODS])
    trainers = _table(WHERE, [[name, *cells] for name, cells in TRAINERS.items()])
    return (
        HEAD + _heads() + methods + NOTES + trainers + HELD_HEAD + _held() + VERSIONS + _versions()
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [columns, ["---"] * len(columns)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [*head, *rows])


def _heads() -> str:
    """What every method is for, and who is for less."""
    fewer = []
    for name in METHODS:
        kinds = get_method(name).about.task_types
        if set(kinds) != set(HEADS):
            fewer.append(f"`{name}` ({', '.join(HEADS[kind] for kind in kinds)})")
    but = f", but for {', '.join(fewer)}" if fewer else ""
    return f"Each is for {', '.join(HEADS.values())}{but}.\n\n"


def _row(name: str, kind: type[Method]) -> list[str]:
    saved = "own"
    if issubclass(kind, PeftMethod):
        saved = "LoRA" if issubclass(kind, LoraShaped) else "PEFT"
    return [
        f"`{name}`",
        saved,
        _word(kind.about.merges),
        _word(kind().bears_scaled_loss() or not acts_between_steps(kind())),
        _word(issubclass(kind, PeftMethod)),
        "yes",  # every method of the catalog, by tests/processes/test_methods_together.py
        _in_parts(name, kind),
        _word(name in FOLLOWED),
        _word(name in FLEET),
    ]


def _in_parts(name: str, kind: type[Method]) -> str:
    """Whether a method trains on a backbone that no process has whole."""
    if name in IN_PARTS:
        return "yes"
    is_refused = acts_between_steps(kind()) and not issubclass(kind, Alora)
    return "no" if is_refused or name in OWN_WEIGHTS else "not tried"


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
