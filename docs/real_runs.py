"""Whole runs on real data, and the page that tells what they gave.

Runs `loralloc train` on SST-2 and E2E; a run that is already in the output folder is taken as it
is. Writes docs/results/runs.json and, from it and docs/results/agreement.json, docs/runs.md.

Run: python docs/real_runs.py [--data FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

RUNS = {
    "sst2-minilm": (
        "--task sst2 --dataset_name {data}/sst2 --model_name_or_path minilm-l6 "
        "--num_train_epochs 3 --learning_rate 1e-3"
    ),
    "sst2-smollm2": (
        "--task sst2 --dataset_name {data}/sst2 --model_name_or_path smollm2-135m "
        "--max_steps 120 --learning_rate 5e-4 --num_rounds 4 --warmup_epochs 0.12 "
        "--recovery_epochs 0.04 --eval_on_start true --eval_strategy steps --eval_steps 120"
    ),
    "e2e-smollm2": (
        "--task e2e --dataset_name {data}/e2e_nlg --model_name_or_path smollm2-135m "
        "--max_steps 80 --per_device_train_batch_size 8 --learning_rate 1e-3 --num_rounds 4 "
        "--warmup_epochs 0.04 --recovery_epochs 0.0134 --eval_strategy steps --eval_steps 80"
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, collect, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real")
    args = parser.parse_args(argv)
    results = {}
    for name, flags in RUNS.items():
        folder = args.out / name
        if not (folder / "README.md").is_file():
            command = [*shlex.split(flags.format(data=args.data)), "--output_dir", str(folder)]
            subprocess.run(
                [sys.executable, "-m", "loralloc", "train", *command, "--overwrite"], check=True
            )
        results[name] = {"flags": flags.format(data="DATA"), **collect(folder)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    data = {"machine": machine, "runs": results}
    (RESULTS / "runs.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    measured = RESULTS / "agreement.json"
    agreement = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    (ROOT / "docs" / "runs.md").write_text(page(data, agreement), encoding="utf-8")


def collect(folder: Path) -> dict[str, Any]:
    """What a run folder tells about its run."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "allocation.json").read_text())
    start, now = record["initial_ranks"], record["rounds"][-1]["ranks_after"]
    accuracy = (
        "eval_accuracy" if any("eval_accuracy" in e for e in log) else "eval_mean_token_accuracy"
    )
    return {
        "development": [
            {"step": e["step"], "loss": e["eval_loss"], "accuracy": e.get(accuracy)}
            for e in log
            if "eval_loss" in e
        ],
        "accuracy_of": "labels" if accuracy == "eval_accuracy" else "tokens",
        "train_seconds": next(e["train_runtime"] for e in log if "train_runtime" in e),
        "round_seconds": [r["seconds"] for r in record["rounds"]],
        "settled": [r["settled"] for r in record["rounds"]],
        "churn": [r["churn"] for r in record["rounds"]],
        "total_ranks": [sum(start.values())]
        + [sum(r["ranks_after"].values()) for r in record["rounds"]],
        "modules": len(now),
        "gained": sum(now[m] > start[m] for m in now),
        "lost": sum(now[m] < start[m] for m in now),
        "emptied": sum(not rank for rank in now.values()),
        "least_and_most": [min(now.values()), max(now.values())],
    }


def page(data: dict[str, Any], agreement: dict[str, Any] | None) -> str:
    """docs/runs.md."""
    machine = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
    lines = [
        "# Real runs",
        "",
        "Written by `python docs/real_runs.py --data DATA` from `docs/results/runs.json` and",
        "`docs/results/agreement.json`. DATA holds slices of real data sets, so scores here are",
        "not scores on the official sets. One seed each: these runs show that the system works,",
        "not that allocation helps.",
        "",
        f"Machine: {machine}.",
        "",
    ]
    for name, run in data["runs"].items():
        moved = f"{run['gained']} gained, {run['lost']} lost, {run['emptied']} emptied"
        lines += [
            f"## {name}",
            "",
            "```text",
            f"loralloc train {run['flags']}",
            "```",
            "",
            f"| step | development loss | accuracy ({run['accuracy_of']}) |",
            "|---:|---:|---:|",
            *(
                f"| {e['step']} | {e['loss']:.4f} | {e['accuracy']:.3f} |"
                for e in run["development"]
            ),
            "",
            f"{len(run['round_seconds'])} rounds; total ranks before and after each: "
            f"{', '.join(map(str, run['total_ranks']))}. Of {run['modules']} modules {moved}; "
            f"ranks from {run['least_and_most'][0]} to {run['least_and_most'][1]}. Churn: "
            f"{', '.join('-' if c is None else f'{c:.0%}' for c in run['churn'])}. Rounds settled "
            f"by ablation: {sum(run['settled'])}. Training took {run['train_seconds']:.0f} s, of "
            f"which rounds {sum(run['round_seconds']):.0f} s.",
            "",
        ]
    if agreement:
        lines += agreement_section(agreement)
    if (RESULTS / "literal.json").is_file():
        lines += literal_section(json.loads((RESULTS / "literal.json").read_text("utf-8")))
    return "\n".join(lines) + "\n"


def agreement_section(agreement: dict[str, Any]) -> list[str]:
    """How well the scores agree on the real model."""
    results = agreement["results"]
    keys = [key for key in next(iter(results.values())) if key != "seconds"]
    rows = [
        f"| {key.replace('_', ' ')} | "
        + " | ".join(_shown(r[key]) for r in results.values())
        + " |"
        for key in keys
    ]
    seconds = [
        f"| {key.replace('_', ' ')} (s) | "
        + " | ".join(f"{r['seconds'][key]:.3g}" for r in results.values())
        + " |"
        for key in next(iter(results.values()))["seconds"]
    ]
    quick = " --quick" if agreement["quick"] else ""
    return [
        "## Agreement of the scores",
        "",
        f"`python benchmarks/agreement.py --data DATA --json docs/results/agreement.json{quick}`:",
        "SmolLM2-135M in float32.",
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---:|" * len(results),
        *rows,
        *seconds,
        "",
        "`pool` is the part of the model on which `screened` and `ablation` scored every rank and",
        "their pruned sets were compared; the Spearman correlation is that of `gradient` with",
        "`ablation` over the sampled ranks.",
    ]


def literal_section(literal: dict[str, Any]) -> list[str]:
    """How far prefix sharing is from whole forward passes with gates."""
    quick = " --quick" if literal["quick"] else ""
    return [
        "",
        "## Prefix-shared against literal",
        "",
        "`python benchmarks/agreement.py --data DATA --literal "
        f"--json docs/results/literal.json{quick}`:",
        "eq. 6 with explicit gates and whole forward passes, on PEFT's own forward.",
        "",
        "| task | ranks compared | largest importance | largest difference |",
        "|---|---:|---:|---:|",
        *(
            f"| {task} | {r['compared']} | {r['largest_importance']:.3g} | "
            f"{r['largest_difference_prefix_literal']:.3g} |"
            for task, r in literal["results"].items()
        ),
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
