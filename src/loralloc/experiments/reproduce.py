"""A whole experiment: plan, search, run, collect, and write down what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loralloc.experiments.cell import Cell
from loralloc.experiments.collected import Section, as_data, collect
from loralloc.experiments.estimate import Estimator
from loralloc.experiments.executors.executor import Executor, Resources
from loralloc.experiments.experiment import Terms
from loralloc.experiments.fairness import (
    CarryOut,
    Key,
    Search,
    first_trials,
    search_rates,
    unequal_steps,
)
from loralloc.experiments.files import write_json, write_text
from loralloc.experiments.grid import Grid
from loralloc.experiments.judging import JudgeAt, judge_or_scripted, judged_tables
from loralloc.experiments.tables import Table, latex_text
from loralloc.experiments.views import tables
from loralloc.experiments.work import Outcome, finished

REPORT = "report"
"""What the files of a report are called, by their form: .json, .md, .tex."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell that is to be run, and about how long that takes."""

    cell: Cell
    seconds: float
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of an experiment."""

    grid: Grid
    sections: Sequence[Section]
    tables: Sequence[Table]
    remarks: Sequence[str]
    """What the tables do not say: holes with their reasons, unequal steps."""

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.grid.root / self.grid.experiment.name

    def as_data(self) -> dict[str, Any]:
        """The report as JSON has it."""
        experiment = self.grid.experiment
        return {
            "experiment": experiment.name,
            "title": experiment.title,
            "source": experiment.source,
            "note": experiment.note,
            "printed": experiment.printed,
            "scale": self.grid.scale.name,
            "backbone": Path(self.grid.backbone).name,
            "seeds": list(self.grid.seeds),
            "budgets": {str(rank): number for rank, number in self.grid.budgets.items()},
            "sections": [as_data(section) for section in self.sections],
            "tables": [table.as_data() for table in self.tables],
            "remarks": list(self.remarks),
        }

    def write(self, *, figures: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write it as JSON, Markdown and LaTeX.

        Args:
            figures: Pictures that are in its folder, and what is to be seen on each.
        """
        experiment = self.grid.experiment
        head = (
            f"# {experiment.name}: {experiment.title}\n\n{Path(self.grid.backbone).name}, scale "
            f"{self.grid.scale.name}, seeds {', '.join(map(str, self.grid.seeds))}.\n\n"
        )
        pictures = [f"![{Path(name).stem}]({name})\n\n{said}\n" for name, said in figures.items()]
        parts = [*pictures, *(table.markdown() for table in self.tables)]
        remarks = "".join(f"- {remark}\n" for remark in self.remarks)
        write_json(self.folder / f"{REPORT}.json", self.as_data())
        write_text(self.folder / f"{REPORT}.md", head + "\n".join([*parts, remarks]))
        write_text(
            self.folder / f"{REPORT}.tex",
            "\n".join(
                [*(_included(*one) for one in figures.items()), *(t.latex() for t in self.tables)]
            ),
        )


def _included(name: str, said: str) -> str:
    """A picture as LaTeX has it, by graphicx."""
    lines = (
        r"\begin{figure}",
        rf"\includegraphics[width=\linewidth,height=0.9\textheight,keepaspectratio]{{{name}}}",
        rf"\caption{{{latex_text(said)}}}",
        r"\end{figure}",
        "",
    )
    return "\n".join(lines)


def plan(grid: Grid, terms: Sequence[Terms]) -> list[Planned]:
    """The cells that are known before any has run, each once, with an estimate of its time.

    Of a search the first trials are known, and the runs at its learning rate are counted at the
    scale's own; widened searches come on top.
    """
    cells: dict[tuple[Path, bool], Cell] = {}
    for term in terms:
        tested = grid.at_one_rate(term, {})
        for cell in [*(first_trials(grid) if term == "fair" else []), *tested]:
            cells[(cell.folder, cell.test is None)] = cell
    estimator = Estimator(grid)
    known = list(cells.values())
    estimator.correct(known)
    return [
        Planned(cell=cell, seconds=estimator.seconds(cell), is_finished=finished(cell) is not None)
        for cell in known
    ]


def reproduce(
    grid: Grid,
    terms: Sequence[Terms],
    *,
    executor: Executor,
    resources: Resources,
    judge: JudgeAt | None = None,
    on_cells: Callable[[Sequence[Cell]], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Report:
    """Run what is not finished of an experiment, and write its report.

    Args:
        grid: What is compared.
        terms: On which terms, one or both.
        executor: What carries out cells.
        resources: What it may use.
        judge: Who reviews answers, where there are any.
        on_cells: Called with cells before they are carried out.
        on_outcome: Called with each outcome.

    Raises:
        ValueError: The executor cannot work.
    """

    def carry_out(cells: Sequence[Cell]) -> Iterator[Outcome]:
        if on_cells:
            on_cells(cells)
        for outcome in executor(cells, resources):
            if on_outcome:
                on_outcome(outcome)
            yield outcome

    sections = [carry_out_all(grid, term, carry_out) for term in terms]
    found = tables(grid.experiment, sections)
    scripted = judge is None and grid.scale.name == "smoke"
    folder = grid.root / grid.experiment.name
    if grid.experiment.kind == "judged":
        assert grid.judged_data is not None, "a judged experiment has questions"
        with judge_or_scripted(judge, scripted=scripted) as one:
            for section in sections:
                found += judged_tables(
                    section, one, questions=grid.judged_data, folder=folder, scripted=scripted
                )
    report = Report(grid=grid, sections=sections, tables=found, remarks=_remarks(sections))
    report.write()
    return report


def carry_out_all(grid: Grid, term: Terms, carry_out: CarryOut) -> Section:
    """Everything on the same terms: the search of learning rates first, where there is one."""
    searches: dict[Key, Search] = search_rates(grid, carry_out) if term == "fair" else {}
    rates = {key: search.best for key, search in searches.items()}
    return collect(grid, term, list(carry_out(grid.at_one_rate(term, rates))), searches)


def _remarks(sections: Sequence[Section]) -> list[str]:
    """Holes with their reasons, rates that failed, and runs of other lengths than most."""
    found = []
    for section in sections:
        found += [f"Missing: {hole}" for hole in section.holes()]
        for entry in section.entries:
            failures = entry.search.failures if entry.search else {}
            found += [
                f"Failed in the search: {entry.name} on {entry.task} at {rate:g}: {reason}"
                for rate, reason in failures.items()
            ]
        for task in dict.fromkeys(entry.task for entry in section.entries):
            results = {
                f"{entry.name} on {task}, seed {seed}": result
                for entry in section.entries
                if entry.task == task
                for seed, result in entry.results.items()
            }
            found += [f"Another number of steps: {name}" for name in unequal_steps(results)]
    return found
