"""The tables of an experiment: what came out, beside what the paper printed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loralloc.experiments.collected import CROSS_ENTROPY, Entry, Section
from loralloc.experiments.experiment import BASELINE, Experiment, Kind
from loralloc.experiments.fairness import TOLERANCE
from loralloc.experiments.rank_grid import rank_tables
from loralloc.experiments.statistics import Comparison
from loralloc.experiments.tables import Table

MISSING, HOLE, NOT_PRINTED = "-", "failed", ""

TERMS = {
    "paper": "on the paper's terms (one learning rate)",
    "fair": "on fair terms (searched learning rates, one budget of parameters)",
}

NOISE = "inside the noise"
NOTES = (
    "~: inside the noise, by a paired test against LoRA over seeds and over examples; with one "
    "seed every difference is.",
    "Scores are medians over seeds, from 0 to 100.",
)


def tables(experiment: Experiment, sections: Sequence[Section]) -> list[Table]:
    """All tables of an experiment."""
    views = _VIEWS[experiment.kind]
    found = [view(experiment, section) for section in sections for view in views]
    return [table for group in found for table in group]


def _overview(experiment: Experiment, section: Section) -> list[Table]:
    """Scores by method and task, as the paper's tables have them."""
    printed = experiment.printed.get("scores", {})
    counts = experiment.printed.get("parameters", {})
    measures = _measures(section)
    columns = ["method", "parameters, at first / at the end"]
    columns += [f"{experiment.source}, millions"] if counts else []
    for task, names in measures.items():
        for position, name in enumerate(names):
            columns.append(f"{task} {name}")
            if printed and position == 0:
                columns.append(f"{task}, {experiment.source}")
    rows = []
    for method, rank in _lines(section):
        entries = {e.task: e for e in section.entries if (e.method, e.rank) == (method, rank)}
        row = [_named(experiment, method, rank), _parameters(entries.values())]
        is_papers = rank in experiment.ranks  # and not a step of LoRA's ladder
        row += [_pair(counts.get(method) if is_papers else None)] if counts else []
        for task, names in measures.items():
            for position, name in enumerate(names):
                row.append(_score(section, entries.get(task), name))
                if printed and position == 0:
                    theirs = printed.get(method, {}).get(task) if is_papers else None
                    row.append(_number(theirs, ".1f", NOT_PRINTED))
        rows.append(row)
    title = f"{experiment.title}, {TERMS[section.terms]}"
    return [Table(title=title, columns=columns, rows=rows, notes=[*NOTES, *_said(experiment)])]


def _details(experiment: Experiment, section: Section) -> list[Table]:
    """Every seed with what the statistics say, a table for each task."""
    found = []
    for task, names in _measures(section).items():
        for name in [*names, CROSS_ENTROPY]:
            entries = [entry for entry in section.entries if entry.task == task]
            known = [entry for entry in entries if entry.values(name) or entry.failures]
            if known:
                found.append(_measured(experiment, section, task, name, known))
    return found


def _measured(
    experiment: Experiment, section: Section, task: str, measure: str, entries: Sequence[Entry]
) -> Table:
    is_loss = measure == CROSS_ENTROPY
    form = ".4f" if is_loss else ".2f"
    columns = [
        *("method", "learning rate", "parameters", "of the budget", "every seed", "median"),
        *("mean", "95% interval", "less LoRA's", "p, seeds", "p, examples", "verdict"),
        *(["LoRA-equivalent rank"] if is_loss else []),
    ]
    rows = []
    for entry in entries:
        spread, against = entry.spread(measure), section.against_lora(entry, measure)
        seeds = [
            HOLE if seed in entry.failures else _number(entry.values(measure).get(seed), form)
            for seed in sorted({*entry.results, *entry.failures})
        ]
        share = entry.off_budget()
        interval = spread and spread.interval
        row = [
            _named(experiment, entry.method, entry.rank),
            _rate(entry),
            _number(entry.parameters("stored"), ",d"),
            MISSING if share is None else f"{share:+.1%}",
            " ".join(seeds),
            _number(spread.median if spread else None, form, HOLE),
            _number(spread.mean if spread else None, form, HOLE),
            f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else MISSING,
            told(against, form) if against else MISSING,
            _number(against.p_seeds if against else None, ".3f"),
            _number(against.p_examples if against else None, ".3f"),
            _verdict(section, entry, measure),
        ]
        rows.append([*row, section.lora_equivalent(entry) or MISSING] if is_loss else row)
    numbers = sorted({e.num_examples for e in entries if e.num_examples is not None})
    notes = [f"Test examples: {', '.join(f'{n:,}' for n in numbers)}."] if numbers else []
    notes += _edges(entries) + _off(experiment, entries)
    return Table(
        title=f"{task}, {measure}, {TERMS[section.terms]}", columns=columns, rows=rows, notes=notes
    )


def _sweep(experiment: Experiment, section: Section) -> list[Table]:
    """Scores and losses by budget."""
    found = []
    ranks = sorted({entry.rank for entry in section.entries})
    for task, names in _measures(section).items():
        for name in [*names, CROSS_ENTROPY]:
            form = ".4f" if name == CROSS_ENTROPY else ".2f"
            rows = []
            for method in experiment.methods:
                entries = [section.find(task, method, rank) for rank in ranks]
                rows.append([method, *(_score(section, entry, name, form) for entry in entries)])
            title = f"{task}, {name} by budget, {TERMS[section.terms]}"
            columns = ["method", *(f"r={rank}" for rank in ranks)]
            notes = [*NOTES, *_said(experiment)]
            found.append(Table(title=title, columns=columns, rows=rows, notes=notes))
    return found


def _cost(experiment: Experiment, section: Section) -> list[Table]:
    """Memory, speed and hours, each beside the paper's and as a ratio to LoRA's."""
    kinds: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], float | None], str]] = {
        "memory_gb": ("GB", lambda r: r["peak_bytes"] and r["peak_bytes"] / 1e9, ".2f"),
        "steps_per_s": (
            "steps a second",
            lambda r: r["seconds"] and r["steps"] / r["seconds"],
            ".2f",
        ),
        "hours": ("hours", lambda r: r["seconds"] and r["seconds"] / 3600, ".4f"),
    }
    columns = ["method"]
    for name, _of, _form in kinds.values():
        columns += [name, "over LoRA", experiment.source, "over LoRA"]
    rows = []
    for entry in section.entries:
        row = [entry.method]
        lora = section.find(entry.task, BASELINE, entry.rank)
        for key, (_name, of, form) in kinds.items():
            ours = _median(of(result) for result in entry.results.values())
            base = _median(of(result) for result in lora.results.values()) if lora else None
            printed = experiment.printed.get(key, {})
            row += [
                HOLE if entry.failures else _number(ours, form),
                _ratio(ours, base),
                _number(printed.get(entry.method), "g", NOT_PRINTED),
                _ratio(printed.get(entry.method), printed.get(BASELINE))
                if printed
                else NOT_PRINTED,
            ]
        rows.append(row)
    devices = sorted({r["device"] for e in section.entries for r in e.results.values()})
    note = f"Measured on {', '.join(devices)}; memory is the peak of the whole process on a CPU."
    title = f"{experiment.title}, {TERMS[section.terms]}"
    return [Table(title=title, columns=columns, rows=rows, notes=[note, *_said(experiment)])]


def _ranks(experiment: Experiment, section: Section) -> list[Table]:
    return [
        table
        for entry in section.entries
        for table in rank_tables(
            f"{experiment.title}, {entry.task}, {TERMS[section.terms]}",
            [result["ranks"] for result in entry.results.values() if result["ranks"]],
            notes=_said(experiment),
        )
    ]


def _measures(section: Section) -> dict[str, list[str]]:
    """The figures of every task, in the order of the tasks."""
    found: dict[str, list[str]] = {}
    for entry in section.entries:
        names = found.setdefault(entry.task, [])
        names += [name for name in entry.measures if name not in names]
    return {task: names or ["score"] for task, names in found.items()}


def _lines(section: Section) -> list[tuple[str, int]]:
    """Methods with their ranks, each once, in order."""
    return list(dict.fromkeys((entry.method, entry.rank) for entry in section.entries))


def _named(experiment: Experiment, method: str, rank: int) -> str:
    return method if experiment.ranks == (rank,) else f"{method} r={rank}"


def _parameters(entries: Iterable[Entry]) -> str:
    """Parameters at first and at the end, of the first task that has them."""
    for entry in entries:
        first, end = entry.parameters("trained"), entry.parameters("stored")
        if first is not None:
            return f"{first:,} / {end:,}"
    return MISSING


def _score(section: Section, entry: Entry | None, measure: str, form: str = ".2f") -> str:
    if entry is None:
        return MISSING
    if entry.failures:
        return HOLE
    spread = entry.spread(measure)
    if spread is None:
        return MISSING
    against = section.against_lora(entry, measure)
    return f"{spread.median:{form}}" + (" ~" if against and against.is_noise else "")


def told(against: Comparison, form: str) -> str:
    """A difference with half of its interval over seeds, which says what could have been told."""
    half = "" if against.half_width is None else f" ± {against.half_width:{form}}"
    return f"{against.difference:+{form}}{half}"


def _verdict(section: Section, entry: Entry, measure: str) -> str:
    against = section.against_lora(entry, measure)
    if against is None:
        return MISSING
    if against.is_noise:
        return NOISE
    is_less = against.difference < 0
    return "better" if is_less == (measure == CROSS_ENTROPY) else "worse"


def _rate(entry: Entry) -> str:
    edge = entry.search is not None and entry.search.is_at_edge
    return f"{entry.learning_rate:g}" + (" (edge)" if edge else "")


def _edges(entries: Sequence[Entry]) -> list[str]:
    at_edge = [entry.name for entry in entries if entry.search and entry.search.is_at_edge]
    if not at_edge:
        return []
    return [f"The best learning rate is at an edge of those tried for {', '.join(at_edge)}."]


def _off(experiment: Experiment, entries: Sequence[Entry]) -> list[str]:
    shares = [(_named(experiment, e.method, e.rank), e.off_budget()) for e in entries]
    off = [f"{name} {share:+.1%}" for name, share in shares if share and abs(share) > TOLERANCE]
    return [f"Further from the budget than {TOLERANCE:.0%}: {', '.join(off)}."] if off else []


def _said(experiment: Experiment) -> list[str]:
    return [experiment.note] if experiment.note else []


def _pair(values: Sequence[float] | None) -> str:
    return NOT_PRINTED if values is None else " / ".join(f"{value:g}" for value in values)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ratio(value: float | None, base: float | None) -> str:
    return MISSING if value is None or not base else f"{value / base:.2f}"


def _number(value: float | None, form: str, missing: str = MISSING) -> str:
    return missing if value is None else format(value, form)


_VIEWS: Mapping[Kind, tuple[Callable[[Experiment, Section], list[Table]], ...]] = {
    "scores": (_overview, _details),
    "judged": (_overview,),
    "cost": (_cost,),
    "sweep": (_sweep, _details),
    "ranks": (_ranks,),
}
"""By the kind of the experiment."""
