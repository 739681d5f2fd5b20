"""Tasks trained and tested on real data, and the page that tells what came out.

Runs `loralloc train` and `loralloc eval` as commands; a run that is already in the output folder is
taken as it is. Writes experiments/results/tasks.json and, from it, docs/tasks.md.

Run: python experiments/task_runs.py --data FOLDER [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "tasks.json"
PAGE = ROOT / "docs" / "tasks.md"

ROUNDS = "--num_rounds 8 --warmup_epochs 0.3 --recovery_epochs 0.06 --eval_strategy no"
RUNS = {
    "sst2-minilm": (
        "--task sst2 --dataset_name {data}/sst2 --model_name_or_path minilm-l6 "
        "--num_train_epochs 5 --learning_rate 1e-3",
        {"tuned": ""},
    ),
    "qnli-minilm": (
        "--task qnli --dataset_name {data}/qnli --model_name_or_path minilm-l6 "
        "--num_train_epochs 5 --learning_rate 1e-3",
        {"tuned": ""},
    ),
    "sst2-smollm2": (
        "--task sst2 --dataset_name {data}/sst2 --model_name_or_path smollm2-135m "
        f"--max_steps 400 --learning_rate 5e-4 {ROUNDS}",
        {"untuned": "--base --limit 100", "tuned": "", "tuned, labels scored": "--decode labels"},
    ),
    "e2e-smollm2": (
        "--task e2e --dataset_name {data}/e2e_nlg --model_name_or_path smollm2-135m "
        "--max_steps 90 --learning_rate 1e-3 --num_rounds 4 --warmup_epochs 0.08 "
        "--recovery_epochs 0.03 --eval_strategy no",
        {"untuned": "--base --limit 60", "tuned": "--limit 60"},
    ),
}
"""Flags of training, and of the evaluations on the test split."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, collect, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tasks")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    results = {}
    for name, (flags, evaluations) in RUNS.items():
        folder = args.out / name
        if not (folder / "README.md").is_file():
            given = shlex.split(flags.format(data=args.data))
            command("train", *given, "--output_dir", str(folder), "--overwrite")
        results[name] = {"train": flags.format(data="DATA"), "evaluations": {}}
        for what, more in evaluations.items():
            target = folder / "eval" / what.replace(", ", "-").replace(" ", "-")
            # An evaluation that is finished costs nothing, one that was interrupted goes on.
            command("eval", str(folder), *shlex.split(more), "--output_dir", str(target))
            found = json.loads((target / "eval.json").read_text(encoding="utf-8"))
            found["source"] = Path(found["source"]).name
            results[name]["evaluations"][what] = {"flags": more, **found}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"packages": packages, "runs": results}, indent=1) + "\n", encoding="utf-8"
    )
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """docs/tasks.md."""
    lines = [
        "# Tasks, trained and tested",
        "",
        "Written by `python experiments/task_runs.py --data DATA` from",
        "`experiments/results/tasks.json`. DATA holds slices of real data sets, so these are",
        "not scores on the official sets. One seed",
        "each: they show that the system works, not that allocation helps. Nothing was chosen on a",
        "test split.",
        "",
        "| run | evaluation | examples | figure | implementation |",
        "|---|---|---:|---|---|",
    ]
    for name, result in results.items():
        for what, found in result["evaluations"].items():
            examples = f"{found['num_examples']} of {found['num_in_split']}"
            for figure in found["figures"]:
                value = figure["value"]
                words = f"{figure['name']} " + ("missing" if value is None else f"{value:.1f}")
                said = (figure["missing"] or figure["implementation"]).replace("|", " ")
                lines.append(f"| {name} | {what} | {examples} | {words} | {said} |")
    lines += ["", "## Commands", ""]
    for name, result in results.items():
        lines += ["```text", f"loralloc train {result['train']} --output_dir {name}"]
        for found in result["evaluations"].values():
            lines.append(f"loralloc eval {name} {found['flags']}".rstrip())
        lines += ["```", ""]
    return "\n".join(lines)


def command(*arguments: str) -> None:
    """Run a verb of loralloc as a user does."""
    subprocess.run([sys.executable, "-m", "loralloc", *arguments], check=True)


if __name__ == "__main__":
    main()
