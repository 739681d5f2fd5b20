"""Whole runs at equal steps: LoRA, ALoRA and PEFT's AdaLoRA; and what a round costs.

`minilm-l6` on SST-2 (6,000 examples, 4 epochs, 8 rounds) and `smollm2-135m` on E2E (1,000 examples,
3 epochs, 8 rounds), each run in a process of its own, the contestants by turns (AdaLoRA in the
first only). With `--quick` no run is taken to its end: steps and rounds of `smollm2-135m` are timed
in one process, and the whole run is composed from them at the paper's E2E proportions (42,061
examples, 10 epochs, batch 16, 8 rounds).

Run: python benchmarks/end_to_end.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import TrainingArguments
from whole_run import CONTESTANTS

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.training import scoring_batch

PAPER_STEPS = 42_061 // 16 * 10
PAPER_ROUNDS = 8
RUNS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "minilm-l6": (2, "sst2", ("--num_train_epochs", "4", "--learning_rate", "1e-3")),
    "smollm2-135m": (
        1,
        "e2e",
        ("--max_steps", "189", "--warmup_epochs", "0.16", "--recovery_epochs", "0.04"),
    ),
}
"""Model -> turns (a run of `smollm2-135m` takes long), task, flags."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    sets = harness.data_sets(args.data)
    result: dict[str, Any] = {"quick": args.quick, "round": rounds(sets, 2 if args.quick else 6)}
    of_rounds = result["round"]
    harness.show(
        f"a round of smollm2-135m on {of_rounds['task']}, {of_rounds['dtype']}",
        ("", "seconds"),
        [(name, statistics.median(s)) for name, s in of_rounds["seconds"].items()],
    )
    round_s, step_s = of_rounds["seconds"]["round"], of_rounds["seconds"]["training_on_as_many"]
    result["round_over_training_examples"] = harness.ratio(round_s, step_s)
    composed = compose(statistics.median(round_s), statistics.median(step_s) / 2)
    result["alora_over_lora_time_at_paper_proportions"] = composed
    if args.quick:
        result["alora_over_lora_time"] = composed
        peaks = {name: peak_bytes(name, *first_task(sets)) for name in ("lora", "alora")}
        result["alora_over_lora_peak_memory"] = peaks["alora"] / peaks["lora"]
    else:
        result["runs"] = {model: runs_of(model, sets) for model in RUNS}
        for model, taken in result["runs"].items():
            show(model, taken)
        whole = {"time": "seconds", "cpu_time": "cpu_seconds", "peak_memory": "peak_bytes"}
        for key, of in whole.items():
            result[f"alora_over_lora_{key}"] = max(
                harness.ratio([r[of] for r in t["alora"]], [r[of] for r in t["lora"]])
                for t in result["runs"].values()
            )
    keys = ("round_over_training_examples", "alora_over_lora_time", "alora_over_lora_peak_memory")
    harness.show(
        "composed at the paper's proportions" if args.quick else "whole runs",
        ("", "ratio"),
        [(key, result[key]) for key in keys],
    )
    harness.write(args.json, result)


SHORT = (
    *("--max_steps", "8", "--num_rounds", "2"),
    *("--warmup_epochs", "0.005", "--recovery_epochs", "0.01"),
)


MAP_LARGE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""glibc keeps freed blocks in its heap, and with batches of changing lengths the holes grow step by
step. Mapped blocks go back at once, so that the peak is what was held."""


def peak_bytes(contestant: str, task: str, data: str) -> int:
    """Peak resident memory of a short run with rounds in it; its longest batch comes first."""
    taken = whole_run(contestant, task, data, "smollm2-135m", *SHORT, environment=MAP_LARGE_BLOCKS)
    return int(taken["peak_bytes"])


def first_task(sets: dict[str, str]) -> tuple[str, str]:
    """E2E where it is at hand, else the demo."""
    task = "e2e" if "e2e" in sets else next(iter(sets))
    return task, sets[task]


def rounds(sets: dict[str, str], repeats: int) -> dict[str, Any]:
    """Seconds of a round (score, plan, resize), and of training on as many examples."""
    task, data = first_task(sets)
    run = harness.prepare(task, data)
    trainer, model = run.trainer, run.model
    config = AllocationConfig(seed=0)
    batches = scoring_batch.draw(
        trainer, trainer.eval_dataset, num_examples=config.scoring_examples, seed=0
    )
    allocator = Allocator(model, config, batches)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def training() -> None:
        model.train()
        for batch in batches:
            trainer.compute_loss(model, dict(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), TrainingArguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    seconds = harness.by_turns(
        {"training_on_as_many": training, "round": lambda: allocator.step(optimizer)},
        repeats=repeats,
    )
    return {
        "task": task,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "shapes": [list(batch["input_ids"].shape) for batch in batches],
        "seconds": seconds,
    }


def compose(round_s: float, step_s: float) -> float:
    """ALoRA's time over LoRA's for the paper's E2E run, from a round's and a step's seconds."""
    return 1 + PAPER_ROUNDS * round_s / (PAPER_STEPS * step_s)


def runs_of(model: str, sets: dict[str, str]) -> dict[str, list[Any]]:
    """Every contestant's whole runs, one after the other in each turn."""
    turns, task, flags = RUNS[model]
    task = task if task in sets else next(iter(sets))
    taken: dict[str, list[Any]] = {name: [] for name in CONTESTANTS}
    for turn in range(turns):
        for name in CONTESTANTS[:2] if turn else CONTESTANTS:  # AdaLoRA, the slowest, once
            taken[name].append(whole_run(name, task, sets[task], model, *flags))
    return taken


def whole_run(
    contestant: str,
    task: str,
    data: str,
    model: str,
    *flags: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `whole_run.py` printed, run in a process of its own."""
    script = Path(__file__).with_name("whole_run.py")
    done = subprocess.run(
        [sys.executable, str(script), contestant, task, data, model, *flags],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def show(model: str, taken: dict[str, list[Any]]) -> None:
    """One model's table."""
    base = {of: [r[of] for r in taken["lora"]] for of in ("seconds", "peak_bytes")}
    rows = []
    for name, results in taken.items():
        seconds, peaks = ([r[of] for r in results] for of in ("seconds", "peak_bytes"))
        over = harness.ratio(seconds, base["seconds"]), harness.ratio(peaks, base["peak_bytes"])
        rows.append((name, statistics.median(seconds), over[0], max(peaks) / 2**30, over[1]))
    columns = ("", "seconds", "over LoRA", "peak GiB", "over LoRA ")
    harness.show(f"whole runs of {model}", columns, rows)


if __name__ == "__main__":
    main()
