"""Runs trained at once on one backbone against the same runs one by one.

Each run has a learning rate, a rank and a seed of its own. Only training counts: loading the model
and the data does not. Both sides train every run for as many steps; the losses of both are kept, so
that the JSON shows that they trained the same.

Run: python benchmarks/fleet.py [--runs 16] [--steps 100] [--quick] [--json FILE]
"""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import PrinterCallback

import loralloc
from loralloc.experiments.tiny_backbones import build

RATES, RANKS = (5e-4, 1e-3, 2e-3, 4e-3), (2, 4, 8, 16)
BAR = 0.25
"""What the runs at once may take at most of the seconds of the runs one by one, on a GPU."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, default=16, help="how many runs [16]")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each [100]")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step of a run [16]")
    parser.add_argument("--model", default="smollm2-135m", help="backbone [smollm2-135m]")
    parser.add_argument("--dtype", help="type of the frozen weights")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.quick:
            args.runs, args.steps, args.batch = min(args.runs, 4), min(args.steps, 8), 4
            args.model, args.dtype = build("tiny-llama", folder), "float32"
        task, data = harness.first_task(harness.data_sets(args.data))
        common = {
            "task": task,
            "dataset_name": data,
            "model_name_or_path": args.model,
            "dtype": args.dtype,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch,
            "method": "lora",
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        runs = [{**common, **own} for own in members(args.runs)]
        warm_up = [{**options, "max_steps": 2} for options in runs]
        at_once(warm_up, folder / "warm_up")
        together, seconds, together_bytes = at_once(runs, folder / "at_once")
        alone = [one(options, folder / "alone") for options in runs]
    by_one = sum(taken for _, taken, _ in alone)
    apart = [abs(a - b) for mine, (its, *_) in zip(together, alone, strict=True)
             for a, b in zip(mine, its, strict=True)]  # fmt: skip
    result = {
        "command": "benchmarks/fleet.py",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "options": {**common, "runs": args.runs, "dtype": args.dtype},
        "seconds_at_once": seconds,
        "seconds_one_by_one": by_one,
        "seconds_of_each": [taken for _, taken, _ in alone],
        "at_once_over_one_by_one": seconds / by_one,
        "peak_bytes_at_once": together_bytes,
        "peak_bytes_of_one": max(peak for *_, peak in alone),
        "largest_difference_of_losses": max(apart),
        "losses_at_once": together,
        "losses_one_by_one": [losses for losses, *_ in alone],
    }
    harness.show(
        f"{args.runs} runs of {Path(str(args.model)).name}, {args.steps} steps each",
        ("", "seconds", "peak GiB"),
        (
            ("one by one", by_one, result["peak_bytes_of_one"] / 2**30),
            ("at once", seconds, together_bytes / 2**30),
            ("ratio", seconds / by_one, ""),
        ),
    )
    harness.write(args.json, result)


def members(count: int) -> list[dict[str, Any]]:
    """Rates by ranks, and further seeds where there are more runs."""
    return [
        {
            "learning_rate": RATES[number % 4],
            "lora_r": RANKS[number // 4 % 4],
            "lora_alpha": 2 * RANKS[number // 4 % 4],
            "seed": number // 16,
        }
        for number in range(count)
    ]


def at_once(runs: Sequence[dict[str, Any]], folder: Path) -> tuple[list[list[float]], float, int]:
    """Losses of every run, the seconds of all, and the most memory that was held on a GPU."""
    fleet = loralloc.FleetRuns()
    for number, options in enumerate(runs):
        run = fleet.add({**options, "output_dir": folder / str(number)})
        run.trainer.remove_callback(PrinterCallback)
    errors, seconds, peak = _measured(fleet.train)
    for error in errors:
        if error is not None:
            raise error
    losses = [_losses(run) for run in fleet.runs]
    del fleet, run
    _free()
    return losses, seconds, peak


def one(options: dict[str, Any], folder: Path) -> tuple[list[float], float, int]:
    """The same of one run."""
    run = loralloc.prepare({**options, "output_dir": folder}, overwrite=True)
    run.trainer.remove_callback(PrinterCallback)
    _, seconds, peak = _measured(functools.partial(loralloc.train, run))
    losses = _losses(run)
    del run
    _free()
    return losses, seconds, peak


def _measured(function: Any) -> tuple[Any, float, int]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found, seconds = harness.timed(function)
    return found, seconds, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _losses(run: loralloc.Run) -> list[float]:
    return [float(entry["loss"]) for entry in run.trainer.state.log_history if "loss" in entry]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
