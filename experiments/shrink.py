"""How small an adapter can become: shrink from r = 8, beside what else ends at that size.

On E2E (smollm2-135m), SST-2 and QNLI (minilm-l6), for each seed:

    shrink      from r = 8 on every linear layer, by singular values, while held-out loss allows
    rates       the same, and modules that shrank train faster (`rank_lr_power` 0.5)
    lora-8      LoRA with r = 8
    lora        LoRA at the whole rank nearest to the size that shrink ended with, 1 at least
    random      from r = 8 to that size, its ranks drawn
    truncate    LoRA of twice that whole rank, cut to the largest singular values of all modules

A run of `loralloc` each, tested by the cross-entropy of the test rows. Of every arm alike the first
seed is run at each rate, at twice or half of it while the best is at an edge, and the others at the
one of the lowest development loss. A cell whose JSON is in the output folder is not run again, and
one that was cut short goes on. The tables go into docs/alora.md.

Run: python experiments/shrink.py --data FOLDER [--only TASK ...] [--arms ARM ...] [--seeds N ...]
"""

from __future__ import annotations

import argparse
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
from loralloc.experiments.rows import hash_of, rows_of
from loralloc.experiments.work import attempt
from loralloc.methods.peft_method import rank_parameters, resolve_targets
from loralloc.runs.models import empty_model
from loralloc.runs.quiet import prepare_process

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "shrink"
RANK = 8
NAMES = {
    "shrink": "`shrink` from r = 8",
    "rates": "the same with `rank_lr_power=0.5`",
    "lora-8": "LoRA, r = 8",
    "lora": "LoRA of that size",
    "random": "ranks drawn, to that size",
    "truncate": "twice that size, cut by singular values",
}
ARMS = tuple(NAMES)
SIZED = ("lora", "random", "truncate")
"""Arms that have the size that shrink found with the same seed."""

PAGE = ROOT / "docs" / "alora.md"
BEGIN, END = "<!-- shrunk -->", "<!-- end of shrunk -->"

MOST_WIDER = 3
"""Rates beyond an edge, at most."""

EVAL_BATCH = 32
"""Development rows at once."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task with its backbone, and how long it trains."""

    backbone: str
    steps: int
    batch: int
    test: Mapping[str, Any]

    rows: Mapping[str, int] | None = None
    """The first rows of each split, where not all are taken."""

    dtype: str = "float32"
    """Of the backbone; the adapter is in float32."""

    judging: int = 256
    """Development rows that sizes are compared on."""

    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates of every arm: LoRA's best is larger where there are few ranks."""


SETTINGS = {
    "e2e": Setting(
        backbone="smollm2-135m",
        steps=100,
        batch=8,
        test={"decode": "greedy", "max_new_tokens": 1},
        rows={"train": 800, "validation": 150, "test": 200},
        dtype="bfloat16",
        judging=32,
        rates=(2e-3, 4e-3, 8e-3),
    ),
    "sst2": Setting(backbone="minilm-l6", steps=500, batch=16, test={}),
    "qnli": Setting(backbone="minilm-l6", steps=300, batch=16, test={}, rates=(5e-4, 1e-3)),
}
"""By task. Of E2E only the cross-entropy is read, so what is written are single tokens; it is one
pass over 800 rows, with the backbone in half precision, for want of a faster machine. A row of E2E
has some thirty targets. On QNLI nothing learnt at 2e-3 (r = 8 and 4, shrink: 0.68 and more)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shrink")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of every run, in the place of the usual")
    parser.add_argument("--limit", type=int, help="test rows, in the place of the usual")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    if (args.steps or args.limit) and args.out == RESULTS:
        parser.error("--steps and --limit are no runs of docs/alora.md: name another folder, --out")
    prepare_process()
    complete = all([carry_out_task(args, task) for task in args.only])
    if args.out == RESULTS:
        write_table(args.out)
    sys.stdout.write("\n".join(tables(args.out)))
    return 0 if complete else 1


def carry_out_task(args: argparse.Namespace, task: str) -> bool:
    """All arms that are asked for, shrink first, which says of what size; whether all is there."""
    if not carry_out_arm(args, task, "shrink"):
        return False
    return all([carry_out_arm(args, task, arm) for arm in args.arms if arm != "shrink"])


def carry_out_arm(args: argparse.Namespace, task: str, arm: str) -> bool:
    """All runs of an arm: its rates on the first seed, the best on the others."""
    first, *others = args.seeds
    wanted = list(SETTINGS[task].rates)
    for _ in range(1 + MOST_WIDER):
        if not all([carry_out(args, task, arm, rate, first) for rate in wanted]):
            return False
        rates = tried(args, task, arm)
        best = best_rate(rates)
        wanted = [2 * best] if best == max(rates) else [best / 2] if best == min(rates) else []
    return all([carry_out(args, task, arm, best, seed) for seed in others])


def tried(args: argparse.Namespace, task: str, arm: str) -> dict[float, float]:
    """Development losses of the first seed, by learning rate."""
    paths = Path(args.out).glob(name_of(args, task, arm, None, args.seeds[0]))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {run["learning_rate"]: float(run["dev_loss"]) for run in found}


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate of the lowest development loss, of losses by rate."""
    return min(losses, key=losses.__getitem__)


def name_of(args: argparse.Namespace, task: str, arm: str, rate: float | None, seed: int) -> str:
    """How the JSON of a cell is called; with any rate, for None."""
    size = size_of(args, task, arm, seed)
    of_rate = "*" if rate is None else f"{rate:g}"
    named = [task, arm, *([] if size is None else [size]), f"lr{of_rate}", f"seed{seed}"]
    return "-".join(map(str, named)) + ".json"


def size_of(args: argparse.Namespace, task: str, arm: str, seed: int) -> int | None:
    """Parameters that an arm is to have: as many as shrink ended with, at its best rate."""
    if arm not in SIZED:
        return None
    best = best_rate(tried(args, task, "shrink"))
    found = Path(args.out) / name_of(args, task, "shrink", best, seed)
    return int(json.loads(found.read_text(encoding="utf-8"))["parameters"])


def carry_out(args: argparse.Namespace, task: str, arm: str, rate: float, seed: int) -> bool:
    """One cell, unless its JSON is there; whether it is there now."""
    path = Path(args.out) / name_of(args, task, arm, rate, seed)
    size = size_of(args, task, arm, seed)
    made = cell(args, task, arm, rate, seed, size)
    if path.is_file():
        check_same(path, made)
        return True
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
        "size": size,
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


def check_same(path: Path, made: Cell) -> None:
    """Refuse a result that is there of a run with other options.

    Raises:
        SystemExit: Naming the first of them.
    """
    before = json.loads(path.read_text(encoding="utf-8"))["options"]
    for name, value in made.options.items():
        if name in before and before[name] != value:
            raise SystemExit(
                f"{path} is of a run with {name} {before[name]}, which is {value} now; name "
                "another folder with --out."
            )


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
    rows = rows_of(task, data=args.data, limits=setting.rows, folder=args.runs / "data")
    rank = RANK
    more: dict[str, Any] = {}
    model = empty_model(setting.backbone)
    of_a_rank = rank_parameters(model, resolve_targets(model, None))
    if arm in ("lora", "truncate"):
        assert size is not None
        rank = max(1, round(size / of_a_rank))
        more = {"method.over": "all"} if arm == "truncate" else {}
    elif arm == "random" and size != RANK * of_a_rank:
        more = {
            "allocation.prune_by": "scores",
            "allocation.score": "random",
            "allocation.target_parameters": size,
        }
    elif arm == "rates":
        more = {"allocation.rank_lr_power": 0.5}
    methods = {"lora-8": "lora", "rates": "shrink", "random": "shrink" if more else "lora"}
    method = methods.get(arm, arm)
    if method == "shrink":
        more["allocation.judging_examples"] = setting.judging
    options = {
        "task": task,
        "dataset_name": rows,
        "model_name_or_path": setting.backbone,
        "dtype": setting.dtype,
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
        rows=hash_of(rows),
        root=str(args.runs),
        test=test,
    )


def write_table(folder: Path) -> None:
    """The tables between the two marks of docs/alora.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([before + BEGIN, *tables(folder), END + after]), encoding="utf-8")


def tables(folder: Path) -> list[str]:
    """Every task's arms at their best rates, with parameters and test cross-entropy by seed."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        cells.setdefault((data["task"], data["arm"]), []).append(data)
    lines = []
    for task, setting in SETTINGS.items():
        if (task, "shrink") not in cells:
            continue
        half = ", the backbone in bfloat16" if setting.dtype == "bfloat16" else ""
        shrunk = at_best_rate(cells[task, "shrink"])
        sizes = {run["seed"]: run["parameters"] for run in shrunk}
        steps = shrunk[0]["steps"]
        lines += [
            f"**{task}**, {setting.backbone}{half}, {steps} steps of {setting.batch} rows:",
            "",
            "| | learning rate | parameters, every seed | test cross-entropy, every seed | mean |",
            "|---|---:|---:|---:|---:|",
        ]
        for arm in ARMS:
            runs = cells.get((task, arm), [])
            if arm in SIZED:
                runs = [run for run in runs if run["size"] == sizes.get(run["seed"])]
            if is_whole(runs, setting.rates, list(sizes)):
                lines.append(row(arm, runs))
        lines.append("")
    return lines


def is_whole(
    runs: Sequence[Mapping[str, Any]], rates: Sequence[float], seeds: Sequence[int]
) -> bool:
    """Whether an arm was run at each rate with the first seed, and at its best with all."""
    of_first = {run["learning_rate"] for run in runs if run["seed"] == seeds[0]}
    return of_first >= set(rates) and [run["seed"] for run in at_best_rate(runs)] == list(seeds)


def at_best_rate(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """An arm's runs at the rate of the lowest development loss of the first seed, by seed."""
    first = min(run["seed"] for run in runs)
    best = min((run for run in runs if run["seed"] == first), key=_dev_loss)
    chosen = [run for run in runs if run["learning_rate"] == best["learning_rate"]]
    return sorted(chosen, key=lambda run: run["seed"])


def _dev_loss(run: Mapping[str, Any]) -> float:
    return float(run["dev_loss"])


def row(arm: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """One arm of a table, of all its runs."""
    first = min(run["seed"] for run in runs)
    searched = [run["learning_rate"] for run in runs if run["seed"] == first]
    runs = at_best_rate(runs)
    losses = [run["test_cross_entropy"] for run in runs]
    sizes = " ".join(f"{run['parameters']:,}" for run in runs)
    each = " ".join(f"{loss:.4f}" for loss in losses)
    mean = statistics.mean(losses)
    best = runs[0]["learning_rate"]
    rate = f"{best:g}" + (" (edge)" if best in (min(searched), max(searched)) else "")
    return f"| {NAMES[arm]} | {rate} | {sizes} | {each} | {mean:.4f} |"


if __name__ == "__main__":
    sys.exit(main())
