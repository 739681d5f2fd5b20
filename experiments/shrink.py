"""How small an adapter can become: shrink from r = 8, beside what else ends at that size.

On E2E (smollm2-135m), SST-2 and QNLI (minilm-l6), for each seed:

    shrink      from r = 8 on every linear layer, by AB-LoRA, while held-out loss allows
    lora-8      LoRA with r = 8
    lora        LoRA at the whole rank nearest to the size that shrink ended with, 1 at least
    random      from r = 8 to that size, its ranks drawn
    truncate    LoRA of twice that whole rank, cut to the largest singular values of all modules

A run of `loralloc` each, at each learning rate, tested by the cross-entropy of the test rows; the
table has every arm at the rate of its lowest development loss. A cell whose JSON is in the output
folder is not run again, and one that was cut short goes on.

Run: python experiments/shrink.py --data FOLDER [--only TASK ...] [--rates LR ...] [--seeds N ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralloc.allocation.record import Record
from loralloc.allocation.shrinking import in_words
from loralloc.experiments.cell import Cell
from loralloc.experiments.work import attempt
from loralloc.methods.peft_method import rank_parameters, resolve_targets
from loralloc.runs.models import empty_model
from loralloc.runs.quiet import prepare_process

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "shrink"
RANK = 8
ARMS = ("shrink", "lora-8", "lora", "random", "truncate")

EVAL_BATCH = 32
"""Development rows at once."""

RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates of every arm: LoRA's best is larger where there are few ranks."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task with its backbone, and how long it trains."""

    backbone: str
    folder: str
    steps: int
    batch: int
    test: Mapping[str, Any]


SETTINGS = {
    "e2e": Setting(
        backbone="smollm2-135m",
        folder="e2e_nlg",
        steps=400,
        batch=16,
        test={"decode": "greedy", "max_new_tokens": 8, "limit": 300},
    ),
    "sst2": Setting(backbone="minilm-l6", folder="sst2", steps=500, batch=16, test={}),
    "qnli": Setting(backbone="minilm-l6", folder="qnli", steps=500, batch=16, test={"limit": 2000}),
}
"""By task. Of E2E only the cross-entropy is read: the answers that are written are short."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shrink")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of every run, in the place of the usual")
    parser.add_argument("--limit", type=int, help="test rows, in the place of the usual")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    prepare_process()
    failures = 0
    arms = args.arms if "shrink" in args.arms else ("shrink", *args.arms)
    for task, seed, rate in itertools.product(args.only, args.seeds, args.rates):
        failures += sum(not carry_out(args, task, arm, rate, seed) for arm in arms)
    for line in table(args.out):
        sys.stdout.write(line + "\n")
    return 1 if failures else 0


def carry_out(args: argparse.Namespace, task: str, arm: str, rate: float, seed: int) -> bool:
    """One cell, unless its JSON is there; whether it is there now."""
    path = args.out / f"{task}-{arm}-lr{rate:g}-seed{seed}.json"
    if path.is_file():
        return True
    size = None
    if arm not in ("shrink", "lora-8"):
        found = args.out / f"{task}-shrink-lr{rate:g}-seed{seed}.json"
        if not found.is_file():
            return False
        size = json.loads(found.read_text(encoding="utf-8"))["parameters"]
    made = cell(args, task, arm, rate, seed, size)
    outcome = attempt(made)
    if outcome.result is None:
        sys.stderr.write(f"{path.name}: {outcome.failure}\n")
        return False
    result = outcome.result
    is_shrunk = made.method == "shrink"
    record = Record.load(made.folder) if is_shrunk else None
    data = {
        "task": task,
        "backbone": made.backbone,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "parameters": result["parameters"]["stored"],
        "dev_loss": result["dev_loss"],
        "test_cross_entropy": result["test"]["cross_entropy"],
        "test_examples": result["test"]["num_examples"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "sentence": in_words(record) if record else None,
        "frontier": [asdict(entry) for entry in record.frontier] if record else None,
        "options": {k: v for k, v in made.options.items() if k != "dataset_name"},
        "versions": result["versions"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
    return True


def cell(
    args: argparse.Namespace, task: str, arm: str, rate: float, seed: int, size: int | None
) -> Cell:
    """The run of an arm.

    Args:
        args: Of the command line.
        task: Its name.
        arm: One of `ARMS`.
        rate: Its learning rate.
        seed: Of the run.
        size: Parameters that shrink ended with, for arms that are to have as many.
    """
    setting = SETTINGS[task]
    rank = RANK
    more: dict[str, Any] = {}
    if arm in ("lora", "truncate"):
        assert size is not None
        model = empty_model(setting.backbone)
        rank = max(1, round(size / rank_parameters(model, resolve_targets(model, None))))
        more = {"method.over": "all"} if arm == "truncate" else {}
    elif arm == "random":
        more = {"allocation.score": "random", "allocation.target_parameters": size}
    method = {"lora-8": "lora", "random": "shrink"}.get(arm, arm)
    options = {
        "task": task,
        "dataset_name": str(args.data / setting.folder),
        "model_name_or_path": setting.backbone,
        "method": method,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "learning_rate": rate,
        "max_steps": args.steps or setting.steps,
        "per_device_train_batch_size": setting.batch,
        "per_device_eval_batch_size": EVAL_BATCH,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
        **more,
    }
    test = {**setting.test, **({"limit": args.limit} if args.limit else {})}
    return Cell(
        backbone=setting.backbone,
        task=task,
        method=method,
        rank=rank,
        seed=seed,
        learning_rate=rate,
        options=options,
        root=str(args.runs),
        test=test,
    )


def table(folder: Path) -> list[str]:
    """Parameters and test cross-entropy of every arm at its best rate, medians over its seeds."""
    found: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        by_rate = found.setdefault((data["task"], data["arm"]), {})
        by_rate.setdefault(data["learning_rate"], []).append(data)
    lines = [
        "| task | arm | learning rate | parameters | test cross-entropy | seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task, arm in itertools.product(SETTINGS, ARMS):
        by_rate = found.get((task, arm), {})
        if by_rate:
            rate = min(by_rate, key=lambda each: _median(by_rate[each], "dev_loss"))
            runs = by_rate[rate]
            lines.append(
                f"| {task} | {arm} | {rate:g} | {_median(runs, 'parameters'):,.0f} | "
                f"{_median(runs, 'test_cross_entropy'):.4f} | {len(runs)} |"
            )
    return lines


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
