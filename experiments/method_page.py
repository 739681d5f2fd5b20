"""docs/methods.md: every method, what came of it at its best learning rate, and its counts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from study_page import against, told_failures

from loralloc.cli.methods import papers_count, papers_shape
from loralloc.experiments.collected import BASELINE, CROSS_ENTROPY, Entry, Section
from loralloc.experiments.experiment import Experiment
from loralloc.methods.catalog import METHODS, get_method

PRINTED = {
    "lora": "20.0 / 20.0",
    "alora": "20.0 / 19.6",
    "adalora": "40.0 / 20.0",
    "sora": "40.0 / 20.0",
    "salora": "40.0 / 20.0",
    "ssp": "40.0 / 20.0",
    "p-tuning-v2": "20.9 / 20.9",
    "spt": "16.8 / 16.8",
    "houlsby": "21.0 / 21.0",
    "parallel-adapter": "21.0 / 21.0",
    "adapterdrop": "21.0 / 21.0",
    "lst": "21.1 / 21.1",
    "learned-adapter": "21.2 / 21.2",
}
"""Table 1 of Liu et al. 2024: millions of parameters on LLaMA-2-7B, at first and at the end."""

REMARKS = {
    "alora": "19.6 is what is left where budget finds no receiver; it depends on the run",
    "p-tuning-v2": "80 tokens of keys and values a layer; printed 20.9 is cut off, not rounded",
    "spt": "with the soft prompt of 40,960, without it 16,777,216",
    "lst": "no width gives 21.1; this is 28 side blocks of width 128",
    "learned-adapter": "21.2 needs two b x b matrices an adapter; ours has one and a convolution",
}


def method_page(experiment: Experiment, section: Section) -> str:
    """The page.

    Args:
        experiment: That of `experiments/methods.yaml`.
        section: What has been run of it; rows that are not whole are left out.
    """
    lines = [*INTRODUCTION, *_methods()]
    tables: list[str] = []
    for task in experiment.tasks:
        of_task = [entry for entry in section.entries if entry.task == task]
        entries = [entry for entry in of_task if entry.is_whole]
        told = told_failures(of_task)
        if entries or told:
            steps = f"{experiment.settings['max_steps']:,} steps of 16 examples"
            tables += ["", f"## {task}, {experiment.backbones['small']}, {steps}", ""]
            if len(entries) < len(of_task):
                tables += [f"Whole so far: {len(entries)} of {len(of_task)} rows.", ""]
            tables += [*told, *(_table(entries) if entries else [])]
    return "\n".join([*lines, *([*tables, *NOTES] if tables else NONE_YET), *_counts()]) + "\n"


def _table(entries: Sequence[Entry]) -> list[str]:
    lora = next((entry for entry in entries if entry.method == BASELINE), None)
    lines = [
        "| method | learning rate | seeds | test accuracy | test cross-entropy | less LoRA's | "
        "parameters kept | of the budget | steps that search | what was found | "
        "seconds a step over LoRA |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for entry in entries:
        runs = list(entry.results.values())
        edge = " (edge)" if entry.search and entry.search.is_at_edge else ""
        share = entry.off_budget()
        lines.append(
            f"| {entry.method} | {entry.learning_rate:g}{edge} | {len(runs)} | "
            f"{_spread(entry, entry.measures[0], 1)} | {_spread(entry, CROSS_ENTROPY, 4)} | "
            f"{against(entry, lora) if lora else '-'} | "
            f"{entry.parameters('stored'):,} | {'-' if share is None else f'{share:+.1%}'} | "
            f"{runs[0]['search_steps'] or '-'} | {_found(entry)} | "
            f"{f'{_step(entry) / _step(lora):.2f}' if lora else '-'} |"
        )
    return lines


def _spread(entry: Entry, name: str, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    values = list(entry.values(name).values())
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _step(entry: Entry) -> float:
    return statistics.median(run["seconds"] / run["steps"] for run in entry.results.values())


def _found(entry: Entry) -> str:
    """Means of what the method found, such as the overlap with the draw."""
    runs = list(entry.results.values())
    means = {n: statistics.mean(run["findings"][n] for run in runs) for n in runs[0]["findings"]}
    return ", ".join(f"{name.replace('_', ' ')} {mean:.3f}" for name, mean in means.items()) or "-"


def _methods() -> list[str]:
    """What every method is and how it differs from its paper."""
    lines = [
        "",
        "| method | paper | algorithm | begins | settings | merges | learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        about = get_method(name).about
        merges = "yes" if about.merges else "no"
        rate = f"{about.learning_rate:g}: {about.rate_from}" if about.learning_rate else "-"
        lines.append(
            f"| `{name}` | {about.paper} | {about.status} | {about.initialisation or '-'} | "
            f"{about.settings or '-'} | {merges} | {rate} |"
        )
    return [*lines, *_differences()]


def _differences() -> list[str]:
    """How each method that is not quite its paper's differs from it."""
    told = [(name, get_method(name).about.differs) for name in METHODS]
    return [
        *("", "## What differs from the papers", ""),
        *(f"- `{name}`: {differs}" for name, differs in told if differs),
    ]


def _counts() -> list[str]:
    """The paper's settings, counted on the shape of its backbone."""
    model = papers_shape()
    lines = [
        "",
        "## The paper's counts",
        "",
        "Parameters of `--paper` at the end of a run, on the shape of LLaMA-2-7B without weights,",
        "beside Table 1 of Liu et al. 2024 (millions, at first / at the end).",
        "",
        "| method | ours | Table 1 | remark |",
        "|---|---:|---:|---|",
    ]
    for name, printed in PRINTED.items():
        count = papers_count(get_method(name), model)
        lines.append(f"| {name} | {count:,} | {printed} | {REMARKS.get(name, '-')} |")
    return lines


INTRODUCTION = (
    "# Methods",
    "",
    "Every method by `--method NAME`, at one budget (`--budget N`; by default the parameters of",
    "LoRA with rank 8 on every linear layer of every block) or at the size of the paper's",
    "comparison (`--paper`). `loralloc methods --model MODEL` counts them for a model.",
    "",
    "How near each is to its paper is said of three things apart. The algorithm is faithful (as",
    "published), a port (moved to other backbones), a reconstruction (rebuilt from the paper's",
    "words, where no code was ever published), a control (of no paper: what the others have to be",
    "better than) or ours (of no paper). What its weights begin as and its settings are published,",
    "or ours. The learning rate is what its authors train it with: `--protocol tuned` takes it,",
    "`--protocol paper` has 1e-4 for all.",
)

NONE_YET = (
    "",
    "How they compare at learning rates of their own is what `python experiments/study.py methods",
    "--data DATA` measures, hours long, and writes here; there are no results yet.",
)

NOTES = (
    "",
    "Written by `python experiments/study.py methods --data DATA` from the JSON of every run in",
    "`experiments/results/methods`. Learning rates: five for every row, half powers of ten",
    "around the recommended one, by development loss of seed 0, and up to four beyond where the",
    'best is at an edge ("edge": it still is). Mean and standard deviation on the test split;',
    '"less LoRA\'s" is of cross-entropy, with half of its 95% interval over seeds, below which',
    "little can be told, and ~ that it is inside the noise, by paired tests over seeds and over",
    "examples. Parameters kept are those of the median seed, their distance from the budget that",
    "of the seed furthest from it. Every row trains for as many steps; those of a search come on",
    "top. That is one epoch, too short for ALoRA's places of rounds (the first after one epoch,",
    "the last after 2.75): they are spread over the first 60% of the run, and its budget is held",
    "in parameters, not ranks. All methods on low-rank updates have the scale 1, apart from those",
    "with one of their own, and no dropout. Overlap with draw: the share of the kept ranks that",
    "SoRA's initial gates alone would have kept, at random about 0.5. Density: how dense SaLoRA",
    "was just before it was pruned. Ranks moved: those that L1RA gave to other modules. Methods",
    "of triplets (AdaLoRA and its kin) and DoRA run PEFT's own step, the others on LoRA the fused",
    "one, gates included. Seconds are of a machine that did other work too.",
)
