"""Whole runs at equal steps: LoRA, ALoRA and PEFT's AdaLoRA; and what a round costs.

`minilm-l6` on SST-2 (6,000 examples, 4 epochs, 8 rounds) and `smollm2-135m` on E2E (as many steps
as 3 epochs of 1,000 examples, 8 rounds), each run in a process of its own, by turns of ten steps in
which only one computes (all are held in memory at once: some 18 GiB). With `--quick` no run is
taken to its end: steps and rounds of `smollm2-135m` are timed in one process, and the whole run is
composed from them at the paper's E2E proportions (42,061 examples, 10 epochs, batch 16, 8 rounds).

Run: python benchmarks/end_to_end.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import harness
import torch
from processes import begin, finish, peak_bytes
from transformers import TrainingArguments
from whole_run import CONTESTANTS

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.training.batches import draw

PAPER_STEPS = 42_061 // 16 * 10
PAPER_ROUNDS = 8
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm-l6": ("sst2", {"num_train_epochs": 4, "learning_rate": 1e-3}),
    "smollm2-135m": ("e2e", {"max_steps": 189, "warmup_epochs": 0.16, "recovery_epochs": 0.04}),
}
"""Model -> task, options."""


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
        peaks = {name: peak_bytes(name, *harness.first_task(sets)) for name in ("lora", "alora")}
        result["alora_over_lora_peak_memory"] = peaks["alora"] / peaks["lora"]
    else:
        result["runs"] = {}
        for model in RUNS:
            result["runs"][model] = runs_of(model, sets)
            show(model, result["runs"][model])
        for key, of in {"time": "seconds", "peak_memory": "peak_bytes"}.items():
            result[f"alora_over_lora_{key}"] = max(
                taken["alora"][of] / taken["lora"][of] for taken in result["runs"].values()
            )
    keys = ("round_over_training_examples", "alora_over_lora_time", "alora_over_lora_peak_memory")
    harness.show(
        "composed at the paper's proportions" if args.quick else "whole runs",
        ("", "ratio"),
        [(key, result[key]) for key in keys],
    )
    harness.write(args.json, result)


def rounds(sets: dict[str, str], repeats: int) -> dict[str, Any]:
    """Seconds of a round (score, plan, resize), and of training on as many examples."""
    task, data = harness.first_task(sets)
    run = harness.prepare(task, data)
    trainer, model = run.trainer, run.model
    config = AllocationConfig(seed=0)
    batches = draw(trainer, trainer.eval_dataset, num_examples=config.scoring_examples, seed=0)
    batches = [harness.on_device(batch) for batch in batches]
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


def runs_of(model: str, sets: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every contestant's whole run, by turns."""
    task, options = RUNS[model]
    task = task if task in sets else next(iter(sets))
    return finish({name: begin(name, task, sets[task], model, options) for name in CONTESTANTS})


def show(model: str, taken: dict[str, dict[str, Any]]) -> None:
    """One model's table."""
    lora = taken["lora"]
    rows = [
        (
            name,
            run["seconds"],
            run["seconds"] / lora["seconds"],
            run["peak_bytes"] / 2**30,
            run["peak_bytes"] / lora["peak_bytes"],
        )
        for name, run in taken.items()
    ]
    columns = ("", "seconds", "over LoRA", "peak GiB", "over LoRA ")
    harness.show(f"whole runs of {model}", columns, rows)


if __name__ == "__main__":
    main()
