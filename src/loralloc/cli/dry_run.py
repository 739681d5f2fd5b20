"""What `loralloc train --dry-run` shows: settings with their sources, modules, rounds, costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch
from rich.table import Table
from rich.text import Text
from transformers import TrainerState
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from loralloc.allocation.config import SCORE_OPTIONS, SCORES, AllocationConfig
from loralloc.allocation.importance.unexplained import ITERATIONS
from loralloc.allocation.presets import read_by
from loralloc.cli.console import Console
from loralloc.cli.progress import sized
from loralloc.methods.method import Method
from loralloc.runs.adaptation import LORA_FLAGS
from loralloc.runs.arguments import BLOCK, OPTIONS, RunArguments
from loralloc.runs.estimate import estimate
from loralloc.runs.flags import left_to_us
from loralloc.runs.options import acts
from loralloc.runs.permissions import SECRETS
from loralloc.runs.run import Run
from loralloc.runs.settings import DEFAULT, GIVEN
from loralloc.training.way_of_running import planned_length

DATA, METHOD, TRAINING, ALLOCATION = "data", "model and method", "training", "allocation"
NAMED = {
    **dict.fromkeys(("method", "budget", "paper"), METHOD),
    **dict.fromkeys(("protocol", "early_stopping_patience"), TRAINING),
}
"""Where a setting of the command's own is shown, if not with the data."""

GROUP_OF: dict[type, str] = {
    ScriptArguments: DATA,
    DatasetMixtureConfig: DATA,
    ModelConfig: METHOD,
    RunArguments: DATA,
    SFTConfig: TRAINING,
}
"""Where the others are, by the class that has them."""


def show(run: Run, out: Console) -> None:
    """Print the plan of a run."""
    out.print(_settings_table(run))
    if note := left_to_us(run.settings):
        out.print(note, highlight=False)
    length = planned_length(run.trainer)
    total = length.num_steps
    used = {"train": run.trainer.train_dataset, "validation": run.trainer.eval_dataset}
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in used.items())
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("data", f"{sizes} examples ({run.head.name} head)")
    everything = sum(parameter.numel() for parameter in run.model.parameters())
    rows.add_row("method", f"{sized(run.method)} ({run.method.about.paper})")
    rows.add_row("parameters", f"{run.method.num_trained():,} trainable of {everything:,}")
    if run.method.sized_for:
        rows.add_row("budget", _budget(run.method))
    rows.add_row("steps", f"{total}, {length.steps_per_epoch} an epoch")
    search = run.method.search_steps(total)
    if search:
        rows.add_row(
            "search", f"{search} steps on top, before the {total} that train what was found"
        )
    rows.add_row("takes", _takes(run, total))
    for name, words in {**_rounds(run), **_evaluation(run, total)}.items():
        rows.add_row(name, words)
    out.print(rows)


def _budget(method: Method) -> str:
    """The budget, and how far from it the method ends by its own count."""
    assert method.sized_for is not None
    words = f"{method.sized_for:,} parameters"
    if method.finds_its_size:
        return f"{words} at the start; how many at the end is what it finds"
    if method.counted is None:
        return words
    if method.counted == method.sized_for:
        return f"{words}, which it ends with"
    return f"{words}; {method.counted:,} at the end ({method.counted / method.sized_for - 1:+.1%})"


def _rounds(run: Run) -> dict[str, str]:
    """What moves between modules, where the method allocates."""
    if run.allocation is None:
        return {}
    start = run.allocation.record.initial_ranks
    kinds = Counter(name.rpartition(".")[2] for name in start)
    rounded = next(run.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return {
        "adapted modules": f"{len(start)}: "
        + ", ".join(f"{kind} x{count}" for kind, count in kinds.items()),
        "ranks": f"{sum(start.values()):,}, {run.allocation.round_in_words} a round",
        "rounds": f"after step{'' if len(run.allocation.record.round_steps or ()) == 1 else 's'} "
        + ", ".join(map(str, run.allocation.record.round_steps or ()))
        + (f" ({note})" if (note := run.allocation.record.note) else ""),
        "scoring a round": _scoring_cost(run.allocation.config, sum(start.values()), rounded)
        + _further_cost(run.allocation.config),
    }


def _settings_table(run: Run) -> Table:
    """Every setting that acts, under what it belongs to; a star marks what somebody gave."""
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("source (* given)", style="dim")
    for group, rows in _groups(run).items():
        if rows:
            table.add_row(Text(group, style="bold"))
        for name, value, source in rows:
            given = source.split(" ")[0] in GIVEN
            shown = Text(f"{'*' if given else ' '} {name}", style="bold" if given else "")
            table.add_row(shown, value, source)
    return table


def _groups(run: Run) -> dict[str, list[tuple[str, str, str]]]:
    """Name, value and source of the settings, by group."""
    groups: dict[str, list[tuple[str, str, str]]] = {
        group: [] for group in (DATA, METHOD, TRAINING, ALLOCATION)
    }
    for name, value in _given_settings(run):
        groups[_group_of(name)].append((name, value, run.settings.sources[name]))
    groups[METHOD] += _method_options(run)
    groups[ALLOCATION] += _allocation_options(run)
    return groups


def _group_of(name: str) -> str:
    if name in NAMED:
        return NAMED[name]
    if name.startswith((BLOCK + ".", OPTIONS + ".")):
        return ALLOCATION if name.startswith(BLOCK) else METHOD
    owners = (group for group in GROUP_OF if name in {f.name for f in dataclasses.fields(group)})
    return GROUP_OF[next(owners)]


def _given_settings(run: Run) -> Iterator[tuple[str, str]]:
    """Those of the command's flags, without what cannot act in this run."""
    settings, options = run.settings, run.method.options()
    for name, value in settings.given.items():
        if name in LORA_FLAGS and LORA_FLAGS[name] not in options:
            continue
        if not settings.gives(name) and not acts(settings, name):
            continue
        if name == "num_train_epochs" and run.trainer.args.max_steps > 0:
            continue  # how long the run is, is said by the other
        shown = "(not shown)" if name in SECRETS and value else str(value)
        if name == "dtype" and value is None:
            shown = f"{str(next(run.model.parameters()).dtype).removeprefix('torch.')} (detected)"
        elif value is None and name != "lora_target_modules":
            continue
        yield name, shown


def _method_options(run: Run) -> list[tuple[str, str, str]]:
    """Options of the method that nobody gave."""
    settings, options, rows = run.settings, run.method.options(), []
    for name, value in options.items():
        if name in LORA_FLAGS.values() or f"{OPTIONS}.{name}" in settings.given or value is None:
            continue
        source = "the budget" if name == run.method.size else DEFAULT
        rows.append((f"{OPTIONS}.{name}", str(value), source))
    is_pefts = hasattr(run.model, "peft_config")
    if "lora_target_modules" not in settings.given and "targets" in options and is_pefts:
        targets = run.model.peft_config["default"].target_modules
        names = ", ".join(sorted(targets))
        rows.append(("lora_target_modules", names, "every linear of a block"))
    return rows


def _allocation_options(run: Run) -> list[tuple[str, str, str]]:
    """Options of the allocation that nobody gave and that act with its score and places."""
    if not run.allocation:
        return []
    config, rows = run.allocation.config, []
    of_others = {option for options in SCORE_OPTIONS.values() for option in options.values()}
    idle = of_others - set(SCORE_OPTIONS.get(str(config.score), {}).values()) - {"policy", "seed"}
    if config.rounds_at is not None:
        idle |= {"num_rounds", "warmup_epochs", "recovery_epochs"}
    for option in read_by(run.allocation.allocation):
        name, value = f"{BLOCK}.{option}", getattr(config, option)
        if name in run.settings.given or option in idle or value is None:
            continue
        shown = f"{run.settings.training.seed} (the run's)" if option == "seed" else str(value)
        rows.append((name, shown, DEFAULT))
    return rows


def _takes(run: Run, total: int) -> str:
    """How long the steps take, and how much memory, measured on a few batches."""
    found = estimate(run)
    seconds = total * found.step_s
    shown = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    memory = ""
    if found.peak_bytes is not None:
        where = "on the device" if torch.cuda.is_available() else "by the process"
        memory = f"; {found.peak_bytes / 2**30:.1f} GiB {where}, the optimiser's state not counted"
    timed = "a batch" if found.num_timed == 1 else f"{found.num_timed} batches"
    return (
        f"about {shown} for the steps ({found.step_s:.2g} s each, from {timed}), "
        f"with rounds and evaluations on top{memory}"
    )


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
    start = _first_eligible(run)
    if args.load_best_model_at_end:
        name = args.metric_for_best_model
        best = "lowest development loss" if name == "loss" else f"best {name}"
        words["checkpoint kept"] = f"the one with the {best}, from {start} on"
    if patience:
        words["early stopping"] = f"after {patience} evaluations without a better one since {start}"
    return words


def _first_eligible(run: Run) -> str:
    """From where on a checkpoint may be the best one."""
    if run.allocation:
        last = run.allocation.first_eligible_step()
        is_round = last in (run.allocation.record.round_steps or ())
        return f"step {last} (the last {'round' if is_round else 'size is judged'})"
    reaches_later = type(run.method).first_eligible_step is not Method.first_eligible_step
    return "when its budget is reached" if reaches_later else "the first"


def _scoring_cost(config: AllocationConfig, num_ranks: int, rounded: bool) -> str:
    """In forward passes over the scoring batch; a backward pass through frozen weights is one."""
    paper = 2 * num_ranks
    if config.score == "sensitivity":
        return "none: gathered from the gradients of every step"
    if config.score == "norm":
        return "none: read off the weights"
    if config.score == "random":
        return "none: importance is drawn"
    if config.score == "architecture":
        return "none: until the last round, gates learn from as many batches as the weights"
    if config.score == "ablation":
        return f"about {num_ranks:,} forward passes (the paper's 2R: {paper:,})"
    if config.score == "shapley":
        passes = 2 + 2 * config.shapley_nodes
        return f"about {passes} forward passes or more (the paper's 2R: {paper:,})"
    if config.score not in SCORES:
        return "not known: the score is your own"
    if config.score == "gradient" or rounded:
        return f"about 4 forward passes (the paper's 2R: {paper:,})"
    most = 4 + min(config.verify_ranks, num_ranks)
    return f"about 20 to {most} forward passes (the paper's 2R: {paper:,})"


def _further_cost(config: AllocationConfig) -> str:
    """Of what is measured for new ranks beside the score, likewise."""
    passes = 2 if config.newborns == "potential" else 0
    if config.new_rows == "gradient" or config.policy == "worth":
        passes += 4 * ITERATIONS
    return f", and {passes} for new ranks" if passes else ""
