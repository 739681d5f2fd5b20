"""docs/study.md: what the experiments of `study.py` have given so far."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from study_picture import ceilings

from loralloc.experiments.collected import CROSS_ENTROPY, Entry, Section
from loralloc.experiments.experiment import BASELINE, Experiment
from loralloc.experiments.statistics import compare
from loralloc.experiments.tables import Table
from loralloc.experiments.views import told

DIGITS = ".4f"


def study_page(found: Sequence[tuple[Experiment, Section]], *, pictures: Path) -> str:
    """The page.

    Args:
        found: Every experiment, with what has been run of it.
        pictures: The folder of its pictures, which are drawn.
    """
    lines = [*INTRODUCTION]
    for experiment, section in found:
        run = replace_entries(section)
        made = _ceilings if experiment.kind == "sweep" else _shares
        tables = (made if experiment.ladder else _sizes)(experiment, run)
        command = f"`python experiments/study.py --data DATA {experiment.name}`"
        lines += [f"## {experiment.title}", ""]
        if len(run.entries) < len(section.entries):
            lines += [f"Whole so far: {len(run.entries)} of {len(section.entries)} rows.", ""]
        name = f"study-{experiment.name}"
        if experiment.kind == "sweep" and (drawing := ceilings(name, section)):
            drawing.save(pictures / f"{name}.png")
            lines += [f"![{drawing.title}](images/{name}.png)", "", f"*{drawing.caption}*", ""]
        lines += told_failures(section.entries)
        for table in tables:
            lines += [table.markdown().replace("## ", "### ", 1)]
        lines += [f"Command: {command}.", ""]
    return "\n".join(lines)


def replace_entries(section: Section) -> Section:
    """The section with the entries that are whole."""
    return replace(section, entries=[entry for entry in section.entries if entry.is_whole])


def told_failures(entries: Sequence[Entry]) -> list[str]:
    """What failed of them, a line each: such a row is not to be taken for one still to be run."""
    told = [f"- {entry.name} on {entry.task}: {why}" for entry in entries for why in entry.failed]
    return ["Failed:", "", *told, ""] if told else []


def _ceilings(experiment: Experiment, section: Section) -> list[Table]:
    """LoRA by rank on every task: its best rate, and what the rank gains over the smallest."""
    found = []
    for task in experiment.tasks:
        entries = [entry for entry in section.entries if entry.task == task]
        if not entries:
            continue
        first = entries[0]
        rows = []
        for entry in entries:
            spread = entry.spread(CROSS_ENTROPY)
            assert spread is not None, "the entry is whole"
            rows.append(
                [
                    f"{entry.rank}",
                    _rates(entry),
                    _each(entry),
                    f"{spread.mean:{DIGITS}}",
                    against(entry, first),
                ]
            )
        columns = [
            "rank of LoRA", "development loss by learning rate", "test cross-entropy, every seed",
            "mean", f"less that of rank {first.rank}",
        ]  # fmt: skip
        found.append(Table(title=task, columns=columns, rows=rows, notes=[NOISE]))
    return found


def _shares(experiment: Experiment, section: Section) -> list[Table]:
    """Methods beside LoRA of the same parameters, and what share of the ceiling they win back."""
    found = []
    for task, budget in itertools.product(experiment.tasks, experiment.ranks):
        steps = (budget // 2, 2 * budget, 4 * budget)
        entries = [
            entry
            for entry in section.entries
            if entry.task == task
            and (entry.rank == budget or (entry.method == BASELINE and entry.rank in steps))
        ]
        if not entries:
            continue
        lora, more = (section.find(task, BASELINE, rank) for rank in (budget, 4 * budget))
        rows = []
        for entry in entries:
            spread = entry.spread(CROSS_ENTROPY)
            assert spread is not None, "the entry is whole"
            row = [
                f"{entry.method} r={entry.rank}",
                f"{entry.learning_rate:g}",
                f"{entry.parameters('stored'):,}",
                _each(entry),
                f"{spread.mean:{DIGITS}}",
                against(entry, lora) if lora else "-",
                _share(entry, lora, more),
            ]
            rows.append(row)
        columns = [
            "method", "learning rate", "parameters", "test cross-entropy, every seed", "mean",
            f"less LoRA's at r={budget}", f"share of what r={4 * budget} gains",
        ]  # fmt: skip
        title = f"{task}, r = {budget}" if len(experiment.ranks) > 1 else task
        found.append(Table(title=title, columns=columns, rows=rows, notes=[NOISE]))
    return found


def _sizes(experiment: Experiment, section: Section) -> list[Table]:
    """Adapters from large to small, beside LoRA of the rank that they began with."""
    found = []
    for task in experiment.tasks:
        entries = [entry for entry in section.entries if entry.task == task]
        whole = section.find(task, BASELINE, experiment.ranks[0])
        rows = []
        for entry in sorted(entries, key=lambda entry: -entry.parameters("stored")):
            spread = entry.spread(CROSS_ENTROPY)
            assert spread is not None, "the entry is whole"
            row = [
                entry.method,
                f"{entry.learning_rate:g}",
                f"{entry.parameters('stored'):,}",
                _each(entry),
                f"{spread.mean:{DIGITS}}",
                against(entry, whole) if whole else "-",
            ]
            rows.append(row)
        columns = [
            "method", "learning rate", "parameters", "test cross-entropy, every seed", "mean",
            f"less LoRA's at r={experiment.ranks[0]}",
        ]  # fmt: skip
        if rows:
            found.append(Table(title=task, columns=columns, rows=rows, notes=[NOISE]))
    return found


def _rates(entry: Entry) -> str:
    """Development losses of the search; the best in bold."""
    assert entry.search is not None, "the entry is whole"
    losses = entry.search.losses
    told = [
        f"**{rate:g}: {loss:{DIGITS}}**"
        if rate == entry.search.best
        else f"{rate:g}: {loss:{DIGITS}}"
        for rate, loss in sorted(losses.items())
    ]
    return ", ".join(told) + (" (edge)" if entry.search.is_at_edge else "")


def _each(entry: Entry) -> str:
    return " ".join(f"{value:{DIGITS}}" for value in entry.values(CROSS_ENTROPY).values())


def against(entry: Entry, other: Entry) -> str:
    """The difference, marked where it is inside the noise."""
    if entry is other:
        return "-"
    ours, theirs = entry.examples(CROSS_ENTROPY), other.examples(CROSS_ENTROPY)
    found = compare(
        entry.values(CROSS_ENTROPY),
        other.values(CROSS_ENTROPY),
        examples=None if ours is None or theirs is None else (ours, theirs),
    )
    if found is None:
        return "-"
    return told(found, DIGITS) + (" ~" if found.is_noise else "")


def _share(entry: Entry, lora: Entry | None, more: Entry | None) -> str:
    """What part of the gain of four times the rank a method has; none where there is no gain."""
    if lora is None or more is None or entry is lora or entry is more:
        return "-"
    means = [one.spread(CROSS_ENTROPY) for one in (entry, lora, more)]
    ours, base, best = (spread.mean for spread in means if spread is not None)
    if base <= best or against(more, lora).endswith("~"):
        return "no ceiling"
    return f"{(base - ours) / (base - best):.0%}"


NOISE = (
    "~: inside the noise, by paired tests over seeds and over examples. No ceiling: four times the "
    "rank gains nothing of which a share could be won. Learning rates: each "
    "method's own (LoRA's is 5e-4) and three more, half a power of ten apart, widened while the "
    "best is at an edge, by development loss of seed 0; then seeds 0, 1, 2."
)

INTRODUCTION = (
    "# The study: when does allocation help, and how small may an adapter be?",
    "",
    "Where more rank of LoRA gains nothing, a better division of it has little to win: so the",
    "ceiling is measured first, LoRA at every rank with a learning rate searched for each, and",
    "allocation where there is one. Everything is test cross-entropy of the right answers, which",
    "has less sampling error than accuracy. Differences stand with half of their 95% interval over",
    "seeds: what is much smaller could not have been told. Runs are kept in",
    "`experiments/results/study/cells`, a JSON each; the command below each table runs what is",
    "missing of it and writes this page again. A row may stand in two tables, as LoRA's do.",
    "Searches of MiniLM's learning rates were begun on one H200, with products in TF32 and weights",
    "that had been float16 on the way (at most 4e-4 off); all that was tested ran on a CPU.",
    "",
)
