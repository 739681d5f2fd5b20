"""Which ranks of a trained adapter can go: the order that eq. 6 gives them, and others.

LoRA with r = 8 is trained as in experiments/shrink.py (minilm-l6 on SST-2 and QNLI, smollm2-135m on
E2E, seed 0). Of the finished adapter the ranks that an order puts last are switched off, up to a
share of its parameters, and nothing trains on:

    drawn            the ranks in a drawn order
    norm             s |B_i| |A_i|
    eq. 6            importance of Liu et al. 2024, exactly and to first order
    |without|        the size of its first term alone, to first order
    squares          sum over examples of the square of that term (a diagonal Fisher)

of the ranks as they are trained, and in singular form, where the norm is the singular value. What
that costs is measured on held-out examples, pair by pair; importance on 32 others. The table goes
into docs/alora.md.

Run: python experiments/pruning_order.py --data FOLDER [--only TASK ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import shrink
import torch
from torch import Tensor

from loralloc.adapters.folder import read_adapter
from loralloc.allocation.comparison import example_losses, losses_without
from loralloc.allocation.importance import ablation, gradient
from loralloc.allocation.importance.norm import norms_of
from loralloc.allocation.layers import lora_layers, rank_cost, weights_ab, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits
from loralloc.allocation.shrinking import paired_difference
from loralloc.allocation.singular import take_singular_form
from loralloc.experiments.work import attempt
from loralloc.runs.quiet import prepare_process
from loralloc.runs.resizing import fitting, held_out_objectives
from loralloc.runs.verifying import Source, open_on

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "pruning_order.json"
PAGE = ROOT / "docs" / "alora.md"
BEGIN, END = "<!-- pruning order -->", "<!-- end of pruning order -->"

RATES = {"sst2": 5e-4, "qnli": 5e-4, "e2e": 1e-3}
SEED = 0
SHARES = (0.1, 0.3, 0.5, 0.7)
SHOWN = (0.3, 0.7)
"""Of them, what the table has room for."""

JUDGING = {"sst2": 256, "qnli": 256, "e2e": 64}
"""Held-out examples that costs are measured on; one of E2E has some thirty targets."""

TOO_SLOW = {"e2e": ("eq. 6",)}
"""Orders that are left out: of 1,680 ranks each would be switched off alone, and on alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, measure, write JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shrink")
    parser.add_argument("--only", nargs="*", default=list(RATES), choices=list(RATES))
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    args.steps = args.limit = None
    prepare_process()
    found = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    for task in args.only:
        cell = shrink.cell(args, task, "lora-8", RATES[task], SEED, None)
        outcome = attempt(cell)
        if outcome.result is None:
            sys.stderr.write(f"{task}: {outcome.failure}\n")
            return 1
        data = [f"--task={task}", f"--dataset_name={cell.options['dataset_name']}"]
        found[task] = measure(task, cell.folder, data)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_table(found)
    sys.stdout.write("\n".join(table(found)) + "\n")
    return 0


def measure(task: str, folder: Path, data: Sequence[str]) -> dict[str, Any]:
    """What pruning costs in every order, by share.

    Args:
        task: Its name.
        folder: A finished run of LoRA.
        data: Flags that name its data.
    """
    source = Source(folder, None, False)
    read_adapter(folder)
    model = open_on(source.load(), folder).eval()
    scoring, judging = held_out_objectives(model, source, data, SEED, JUDGING[task])
    costs = {name: rank_cost(layer) for name, layer in lora_layers(model).items()}
    before = example_losses(judging)
    rows = []
    for form in ("trained", "singular"):
        if form == "singular":
            take_singular_form(model)
        for order, importance in orders(model, scoring, form, left_out=TOO_SLOW.get(task, ())):
            costs_at = []
            for share in SHARES:
                off = lowest(importance, costs, share)
                after = losses_without(judging, off, {}, adapter_name="default")
                costs_at.append(paired_difference(before.sums, after.sums, after.counts)._asdict())
            rows.append({"form": form, "order": order, "costs": costs_at})
            sys.stderr.write(f"{form} {order}: {[round(c['mean'], 4) for c in costs_at]}\n")
    return {"held_out_loss": before.mean, "examples": len(before.sums), "rows": rows}


def orders(
    model: Any, scoring: Objective, form: str, *, left_out: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every order's name, and the importance by which the lowest go."""
    layers = lora_layers(model)
    if form == "trained":
        draw = torch.Generator().manual_seed(SEED)
        yield "drawn", {n: torch.rand(len(a), generator=draw) for n, (a, _) in pairs(model).items()}
    norms = {
        name: norms_of(a, b) * layers[name].scaling["default"]
        for name, (a, b) in pairs(model).items()
    }
    yield "norm" if form == "trained" else "singular value", norms
    weights = weights_b(layers)
    for weight in weights.values():
        weight.requires_grad_(True)
    limits = Limits(num_pruned=0)
    if "eq. 6" not in left_out:
        exact = ablation.score(scoring, weights, limits)
        yield "eq. 6", {name: values.cpu() for name, values in exact.importance.items()}
    first = gradient.score(scoring, weights, limits)
    yield "eq. 6 to first order", {name: values.cpu() for name, values in first.importance.items()}
    yield "size of its first term", {n: x.abs().cpu() for n, x in first.terms["without"].items()}
    yield "squares over examples", squares(scoring, weights)


def pairs(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module."""
    return {n: (a.detach(), b.detach()) for n, (a, b) in weights_ab(lora_layers(model)).items()}


def squares(scoring: Objective, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """sum_i (dL_i/dg_r)^2 over examples i, for the gate g_r of every rank."""
    total = {name: torch.zeros(b.shape[1]) for name, b in weights.items()}
    with scoring.evaluating():
        for batch in scoring.batches:
            for row in range(len(batch["labels"])):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                loss = scoring.losses(one).sum()
                for name, b, slope in zip(
                    weights,
                    weights.values(),
                    torch.autograd.grad(loss, list(weights.values())),
                    strict=True,
                ):
                    total[name] += (slope * b.detach()).sum(dim=0) ** 2
    return total


def lowest(
    importance: Mapping[str, Tensor], costs: Mapping[str, int], share: float
) -> dict[str, tuple[int, ...]]:
    """The least important ranks, that many of the parameters."""
    total = sum(costs[name] * len(values) for name, values in importance.items())
    kept = fitting(importance, costs, int(total * (1 - share)))
    return {
        name: tuple(i for i in range(len(values)) if i not in kept[name])
        for name, values in importance.items()
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for every form and order, a column for every task and shown share."""
    heads = [f"{task}, {share:.0%} off" for task in found for share in SHOWN]
    lines = [f"| form | lowest by | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    by_task = {
        task: {(row["form"], row["order"]): row["costs"] for row in of["rows"]}
        for task, of in found.items()
    }
    for form, order in max(by_task.values(), key=len):
        costs = [
            rows[form, order][SHARES.index(share)] if (form, order) in rows else None
            for rows in by_task.values()
            for share in SHOWN
        ]
        shown = [f"{c['mean']:+.4f} ± {c['standard_error']:.4f}" if c else "-" for c in costs]
        lines.append(f"| {form} | {order} | {' | '.join(shown)} |")
    return lines


def write_table(found: Mapping[str, Any]) -> None:
    """The table between the two marks of docs/alora.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([before + BEGIN, *table(found), END]) + after
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
