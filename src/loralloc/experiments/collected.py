"""What came of all cells of an experiment, method by method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralloc.experiments.experiment import BASELINE, Terms
from loralloc.experiments.fairness import Key, Search, off_budget
from loralloc.experiments.grid import Grid
from loralloc.experiments.statistics import Comparison, Spread, compare, equivalent_rank, spread
from loralloc.experiments.work import NOT_RUN, Outcome, Result
from loralloc.tasks.catalog import TASKS

CROSS_ENTROPY = "cross-entropy"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method on a task at a budget, with every seed."""

    task: str
    method: str
    rank: int
    learning_rate: float
    results: Mapping[int, Result] = field(default_factory=dict)
    """Of the runs that are finished, by seed."""

    failures: Mapping[int, str] = field(default_factory=dict)
    """Why the others are not, by seed."""

    search: Search | None = None
    """Where the learning rate was searched for."""

    @property
    def name(self) -> str:
        """The method and its budget."""
        return f"{self.method} r={self.rank}"

    @property
    def is_whole(self) -> bool:
        """Whether its learning rate was searched for, where it is, and every seed was tested."""
        is_searched = self.search is None or NOT_RUN not in self.search.failures.values()
        return is_searched and bool(self.results) and not self.failures

    @property
    def failed(self) -> list[str]:
        """Why runs of it failed that were run: each reason once."""
        trials = self.search.failures.values() if self.search else ()
        return [why for why in dict.fromkeys((*self.failures.values(), *trials)) if why != NOT_RUN]

    @property
    def measures(self) -> list[str]:
        """Names of the figures that its tests gave, the task's own first."""
        figures: list[dict[str, Any]] = next(
            (r["test"]["figures"] for r in self.results.values() if r["test"]), []
        )
        names = [figure["name"] for figure in figures]
        task = TASKS[self.task]
        one_only = bool(task.labels) or "f1-em" in task.metrics  # the others are its parts
        return names[:1] if one_only else names

    def values(self, measure: str) -> dict[int, float]:
        """A measure by seed, where it is there."""
        found = {}
        for seed, result in self.results.items():
            value = _value(result, measure)
            if value is not None:
                found[seed] = value
        return found

    def spread(self, measure: str) -> Spread | None:
        """A measure over all seeds; None where no seed has it, or one is missing."""
        values = self.values(measure)
        return spread(list(values.values())) if values and not self.failures else None

    def examples(self, measure: str) -> dict[int, Sequence[float]] | None:
        """The measure of every example, by seed; None where examples have none of their own.

        A test keeps the score of its first measure; where that is BLEU, of single sentences, of
        which a corpus's BLEU is no mean.
        """
        if measure not in (CROSS_ENTROPY, *self.measures[:1]):
            return None
        found = {}
        for seed, result in self.results.items():
            lists = (result["test"] or {}).get("examples")
            if lists is None:
                return None
            values = lists["losses"] if measure == CROSS_ENTROPY else lists["scores"]
            if values is None or None in values:
                return None
            found[seed] = values
        return found or None

    @property
    def num_examples(self) -> int | None:
        """Examples of the test."""
        return next((r["test"]["num_examples"] for r in self.results.values() if r["test"]), None)

    def parameters(self, when: str) -> int | None:
        """Parameters "trained" at first or "stored" at the end, the median over seeds."""
        counts = [result["parameters"][when] for result in self.results.values()]
        return int(statistics.median_low(counts)) if counts else None

    def off_budget(self) -> float | None:
        """The largest difference of a seed's parameters from the budget, as a share of it."""
        shares = [off_budget(result) for result in self.results.values()]
        known = [share for share in shares if share is not None]
        return max(known, key=abs) if known else None


def _value(result: Result, measure: str) -> float | None:
    test = result["test"]
    if test is None:
        return None
    if measure == CROSS_ENTROPY:
        value = test["cross_entropy"]
        return None if value is None else float(value)
    return next((f["value"] for f in test["figures"] if f["name"] == measure), None)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything on the same terms."""

    terms: Terms
    entries: Sequence[Entry]

    def find(self, task: str, method: str, rank: int) -> Entry | None:
        """The entry of a method on a task at a budget."""
        return next(
            (e for e in self.entries if (e.task, e.method, e.rank) == (task, method, rank)), None
        )

    def against_lora(self, entry: Entry, measure: str) -> Comparison | None:
        """An entry beside LoRA at the same budget; None for LoRA itself, or without it."""
        lora = self.find(entry.task, BASELINE, entry.rank)
        if lora is None or lora is entry:
            return None
        ours, theirs = entry.examples(measure), lora.examples(measure)
        return compare(
            entry.values(measure),
            lora.values(measure),
            examples=None if ours is None or theirs is None else (ours, theirs),
        )

    def lora_ladder(self, task: str) -> dict[int, float]:
        """LoRA's mean test cross-entropy at every budget that it was run at."""
        found = {}
        for entry in self.entries:
            loss = entry.spread(CROSS_ENTROPY) if entry.task == task else None
            if entry.method == BASELINE and loss is not None:
                found[entry.rank] = loss.mean
        return found

    def lora_equivalent(self, entry: Entry) -> str | None:
        """The rank at which LoRA has the same test cross-entropy; None where it is unknown."""
        ladder, loss = self.lora_ladder(entry.task), entry.spread(CROSS_ENTROPY)
        return equivalent_rank(loss.mean, ladder) if len(ladder) > 1 and loss else None

    def holes(self) -> list[str]:
        """What is missing, and why, a sentence each."""
        return [
            f"{entry.name} on {entry.task}, seed {seed}: {reason}"
            for entry in self.entries
            for seed, reason in entry.failures.items()
        ]


def collect(
    grid: Grid,
    terms: Terms,
    outcomes: Iterable[Outcome],
    searches: Mapping[Key, Search],
) -> Section:
    """Sort outcomes into entries.

    Args:
        grid: What was to be run.
        terms: On which terms.
        outcomes: Of all its cells, in whatever order.
        searches: By task, method and rank.
    """
    found: dict[Key, list[Outcome]] = {key: [] for key in grid.rows(terms)}
    for outcome in outcomes:
        cell = outcome.cell
        found[(cell.task, cell.method, cell.rank)].append(outcome)
    entries = []
    for (task, method, rank), of in found.items():
        of.sort(key=lambda outcome: outcome.cell.seed)
        entries.append(
            Entry(
                task=task,
                method=method,
                rank=rank,
                learning_rate=of[0].cell.learning_rate,
                results={o.cell.seed: o.result for o in of if o.result is not None},
                failures={o.cell.seed: o.failure for o in of if o.result is None},
                search=searches.get((task, method, rank)),
            )
        )
    return Section(terms=terms, entries=entries)


def as_data(section: Section) -> dict[str, Any]:
    """A section as JSON has it: every seed, and what the statistics say."""
    return {"terms": section.terms, "entries": [_entry(section, e) for e in section.entries]}


def _entry(section: Section, entry: Entry) -> dict[str, Any]:
    measures = [*entry.measures, CROSS_ENTROPY]
    return {
        "task": entry.task,
        "method": entry.method,
        "rank": entry.rank,
        "learning_rate": entry.learning_rate,
        "search": None
        if entry.search is None
        else {
            "losses": {f"{rate:g}": loss for rate, loss in sorted(entry.search.losses.items())},
            "at_edge": entry.search.is_at_edge,
            "failures": {f"{rate:g}": why for rate, why in entry.search.failures.items()},
        },
        "num_examples": entry.num_examples,
        "parameters": {when: entry.parameters(when) for when in ("trained", "stored")},
        "off_budget": entry.off_budget(),
        "steps": {str(seed): result["steps"] for seed, result in entry.results.items()},
        "measures": {measure: _measure(section, entry, measure) for measure in measures},
        "lora_equivalent_rank": section.lora_equivalent(entry),
        "ranks": {str(seed): result["ranks"] for seed, result in entry.results.items()},
        "failures": {str(seed): reason for seed, reason in entry.failures.items()},
    }


def _measure(section: Section, entry: Entry, measure: str) -> dict[str, Any]:
    found, against = entry.spread(measure), section.against_lora(entry, measure)
    return {
        "by_seed": {str(seed): value for seed, value in entry.values(measure).items()},
        "median": None if found is None else found.median,
        "mean": None if found is None else found.mean,
        "interval": None if found is None else found.interval,
        "against_lora": None
        if against is None
        else {
            "difference": against.difference,
            "half_width": against.half_width,
            "p_seeds": against.p_seeds,
            "p_examples": against.p_examples,
            "inside_the_noise": against.is_noise,
        },
    }
