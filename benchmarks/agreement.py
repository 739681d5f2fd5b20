"""How well the scores agree on a real model: literal, prefix-shared, gradient, screened.

Trains SmolLM2-135M for a few steps in float32 on SST-2 and E2E (or on the embedded demo set where
no data is at hand), then scores the same held-out batch in every way.

Run: python benchmarks/agreement.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from loralloc.allocation.importance import ablation, gradient, screened  # noqa: E402
from loralloc.allocation.layers import lora_layers, weights_b  # noqa: E402
from loralloc.allocation.objective import IGNORED, Objective  # noqa: E402
from loralloc.allocation.policy import Limits, Scores, choose_pruned  # noqa: E402
from loralloc.cli.progress import quiet_libraries  # noqa: E402
from loralloc.training import run as runs  # noqa: E402
from loralloc.training import scoring_batch  # noqa: E402
from loralloc.training.settings import resolve  # noqa: E402
from tests.reference.importance import gates_all, performance  # noqa: E402

NUM_PRUNED = 7
LITERAL = 8
"""Modules whose sampled ranks are also scored literally, with `--literal`."""

FOLDERS = {"sst2": "sst2", "e2e": "e2e_nlg"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--quick", action="store_true", help="fewer steps, examples and ranks")
    parser.add_argument(
        "--literal", action="store_true", help="compare prefix-shared with literal scores, only"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args(argv)
    quiet_libraries()
    tasks = {task: args.data / folder for task, folder in FOLDERS.items()}
    if not all(folder.is_dir() for folder in tasks.values()):
        tasks = {"demo": Path("demo")}
    steps, examples, sample, modules = (10, 8, 24, 4) if args.quick else (120, 32, 48, 8)
    results = {
        task: measure(
            task,
            data,
            steps=steps,
            num_examples=examples,
            sample_size=LITERAL if args.literal else sample,
            num_modules=modules,
            literal=args.literal,
        )
        for task, data in tasks.items()
    }
    Console().print(table(results))
    if args.json:
        machine = {
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        }
        args.json.write_text(
            json.dumps({"machine": machine, "quick": args.quick, "results": results}, indent=1)
            + "\n"
        )


def measure(
    task: str,
    data: Path,
    *,
    steps: int,
    num_examples: int,
    sample_size: int,
    num_modules: int,
    literal: bool,
) -> dict[str, Any]:
    """All scores on one task's held-out batch after a few steps of training."""
    with tempfile.TemporaryDirectory() as folder:
        settings = resolve(
            [
                *("--task", task, "--dataset_name", str(data), "--output_dir", folder),
                *("--model_name_or_path", "smollm2-135m", "--dtype", "float32"),
                *("--per_device_train_batch_size", "8", "--learning_rate", "1e-3"),
            ]
        )
        run = runs.prepare(settings)
    _train(run, steps)
    run.model.eval()
    batches = scoring_batch.draw(
        run.trainer, run.trainer.eval_dataset, num_examples=num_examples, seed=0
    )
    objective = Objective(run.model, batches)
    weights = weights_b(lora_layers(run.model))
    limits = Limits(num_pruned=NUM_PRUNED)
    rng = random.Random(0)

    names = list(weights)
    sample: dict[str, list[int]] = {}
    for _ in range(sample_size):
        name = rng.choice(names)
        free = [i for i in range(weights[name].shape[1]) if i not in sample.get(name, ())]
        sample.setdefault(name, []).append(rng.choice(free))
    shared, shared_s = _timed(lambda: ablation.measure(objective, weights, sample))
    if literal:
        few = dict(list(sample.items())[:LITERAL])
        plain, literal_s = _timed(lambda: literal_importance(objective, few))
        return {
            "training_steps": steps,
            "scoring_examples": num_examples,
            "compared": len(plain),
            "largest_difference_prefix_literal": max(
                abs(float(shared.importance[name][i]) - value) for (name, i), value in plain.items()
            ),
            "largest_importance": max(map(abs, plain.values())),
            "seconds": {"literal_a_rank": literal_s / len(plain)},
        }

    first_order, gradient_s = _timed(lambda: gradient.score(objective, weights, limits))
    # The whole pool on a part of the model, where exact scores of every rank can be had.
    part = {name: weights[name] for name in sorted(rng.sample(names, num_modules), key=names.index)}
    exact = ablation.score(objective, part, limits)
    quick = screened.score(objective, part, limits)
    return {
        "training_steps": steps,
        "scoring_examples": num_examples,
        "ranks": sum(b.shape[1] for b in weights.values()),
        "sampled": sample_size,
        "supervised_tokens": objective.num_targets,
        "spearman": _spearman(first_order, shared, sample),
        "largest_importance": max(
            abs(float(shared.importance[name][i])) for name in sample for i in sample[name]
        ),
        "pool": sum(b.shape[1] for b in part.values()),
        "pruned_set_equal": choose_pruned(quick.importance, limits)
        == choose_pruned(exact.importance, limits),
        "settled": quick.settled,
        "verified": sum(map(len, quick.verified.values())),
        "seconds": {
            "gradient_all_ranks": gradient_s,
            "prefix_shared_a_rank": shared_s / sample_size,
        },
    }


@torch.no_grad()
def literal_importance(
    objective: Objective, sample: dict[str, list[int]]
) -> dict[tuple[str, int], float]:
    """Eq. 6 with gates and whole forward passes, less the constant S(M_0) that all ranks share."""
    model = objective.model

    def s(gates: dict[str, torch.Tensor]) -> float:
        total = 0.0
        for batch in objective.batches:
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += count * float(performance(model, batch, gates))
        return total / objective.num_targets

    importance = {}
    for layer in lora_layers(model).values():
        layer.__class__ = Linear  # gates are hooks on A, which the fused step does not call
    with objective.evaluating():
        s_full, s_base = s(gates_all(model, 1.0)), s(gates_all(model, 0.0))
        for name, indices in sample.items():
            for index in indices:
                without, only = gates_all(model, 1.0), gates_all(model, 0.0)
                without[name][index], only[name][index] = 0.0, 1.0
                importance[name, index] = s_full - s(without) + s(only) - s_base
    return importance


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The results, a column a task."""
    shown = Table(title="agreement of the scores on smollm2-135m, float32")
    shown.add_column("")
    for task in results:
        shown.add_column(task, justify="right")
    keys = [key for key in next(iter(results.values())) if key != "seconds"]
    for key in keys:
        shown.add_row(key, *(_format(result[key]) for result in results.values()))
    for key in next(iter(results.values()))["seconds"]:
        shown.add_row(f"{key} (s)", *(_format(r["seconds"][key]) for r in results.values()))
    return shown


def _train(run: runs.Run, steps: int) -> None:
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=run.settings.training.learning_rate)
    run.model.train()
    batches = iter(run.trainer.get_train_dataloader())
    for _ in range(steps):
        run.trainer.compute_loss(run.model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _spearman(a: Scores, b: Scores, sample: dict[str, list[int]]) -> float:
    left = [float(a.importance[name][i]) for name in sample for i in sample[name]]
    right = [float(b.importance[name][i]) for name in sample for i in sample[name]]
    return float(spearmanr(left, right).statistic)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
