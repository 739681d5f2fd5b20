"""What `loralloc train --dry-run` shows: settings with their sources, modules, rounds, costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import torch
from rich.table import Table
from transformers import TrainerState

from loralloc.allocation.config import AllocationConfig
from loralloc.cli.console import console
from loralloc.training.attach import planned_steps
from loralloc.training.run import Run


def show(run: Run) -> None:
    """Print the plan of a run."""
    out = console()
    out.print(_settings_table(run))
    start = run.allocation.record.initial_ranks
    kinds = Counter(name.rpartition(".")[2] for name in start)
    trainable, everything = run.model.get_nb_trainable_parameters()
    epoch, total = planned_steps(run.trainer)
    used = {"train": run.trainer.train_dataset, "validation": run.trainer.eval_dataset}
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in used.items())
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("data", f"{sizes} examples ({run.head} head)")
    rows.add_row(
        "adapted modules",
        f"{len(start)}: " + ", ".join(f"{kind} x{count}" for kind, count in kinds.items()),
    )
    rows.add_row("ranks", f"{sum(start.values()):,}, {run.allocation.num_pruned} moved a round")
    rows.add_row("parameters", f"{trainable:,} trainable of {everything:,}")
    rows.add_row("steps", f"{total}, {epoch} an epoch")
    rows.add_row("rounds", "after steps " + ", ".join(map(str, run.allocation.steps)))
    for name, words in _evaluation(run, total).items():
        rows.add_row(name, words)
    config = run.settings.allocation
    rounded = next(run.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    rows.add_row("scoring a round", _scoring_cost(config, sum(start.values()), rounded))
    out.print(rows)


def _settings_table(run: Run) -> Table:
    settings = run.settings
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", style="bold")
    table.add_column("value", overflow="fold")
    table.add_column("source", style="dim")
    for name, value in settings.given.items():
        shown = value
        if name == "dtype" and value is None:
            shown = f"{str(next(run.model.parameters()).dtype).removeprefix('torch.')} (detected)"
        if name == "lora_target_modules" or value is not None or name == "dtype":
            table.add_row(name, str(shown), settings.sources[name])
    if "lora_target_modules" not in settings.given:
        targets = run.model.peft_config["default"].target_modules
        table.add_row("lora_target_modules", ", ".join(sorted(targets)), "every linear of a block")
    for field in fields(AllocationConfig):
        name = f"allocation.{field.name}"
        if name not in settings.given:
            value = getattr(settings.allocation, field.name)
            shown = f"{settings.training.seed} (the run's)" if field.name == "seed" else value
            table.add_row(name, str(shown), "loralloc default")
    return table


def _evaluation(run: Run, total: int) -> dict[str, str]:
    """When a run is evaluated, which checkpoint it ends with, and what ends it early."""
    args, patience = run.trainer.args, run.settings.run.early_stopping_patience
    words = {"evaluation": "none"}
    if args.eval_strategy == "epoch":
        words["evaluation"] = "development loss after every epoch"
    elif args.eval_strategy == "steps":
        state = TrainerState()
        state.compute_steps(args, total)  # a number below 1 is a share of the run
        why = run.settings.sources.get("eval_steps", "as logging_steps")
        words["evaluation"] = (
            f"development loss every {state.eval_steps} steps and after the last ({why})"
        )
    start = f"step {run.allocation.steps[-1]} (the last round)"
    if args.load_best_model_at_end:
        name = args.metric_for_best_model
        best = "lowest development loss" if name == "loss" else f"best {name}"
        words["checkpoint kept"] = f"the one with the {best}, from {start} on"
    if patience:
        words["early stopping"] = f"after {patience} evaluations without a better one since {start}"
    return words


def _scoring_cost(config: AllocationConfig, num_ranks: int, rounded: bool) -> str:
    """In forward passes over the scoring batch; a backward pass through frozen weights is one."""
    paper = 2 * num_ranks
    if config.score == "ablation":
        return f"about {num_ranks:,} forward passes (the paper's 2R: {paper:,})"
    if config.score == "shapley":
        passes = 2 + 2 * config.shapley_nodes
        return f"about {passes} forward passes or more (the paper's 2R: {paper:,})"
    if config.score == "gradient" or rounded:
        return f"about 4 forward passes (the paper's 2R: {paper:,})"
    most = 4 + min(config.verify_ranks, num_ranks)
    return f"about 20 to {most} forward passes (the paper's 2R: {paper:,})"
