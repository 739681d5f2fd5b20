"""From an experiment, a scale and a backbone to the cells that have to be run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.allocation.presets import read_by
from loralloc.experiments.cell import Cell
from loralloc.experiments.experiment import BASELINE, DEFAULT_RANK, Experiment, Scale, Terms
from loralloc.experiments.rows import QUESTIONS, hash_of, rows_of
from loralloc.experiments.tiny_backbones import NAMES, build
from loralloc.methods.alora import Alora
from loralloc.methods.catalog import get_method
from loralloc.methods.lora import Lora
from loralloc.runs.adaptation import has_own_scale
from loralloc.tasks.catalog import get_task

SCALE_OF_UPDATES, DROPOUT = 1.0, 0.0
"""Of every method on low-rank updates alike, those apart whose authors have a scale of their own: s
= alpha / r is 1 in the paper's equations."""

GENERATING = ("decode", "num_beams", "max_new_tokens")
"""Options of a test that a language model alone reads."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An experiment that knows its backbone, its rows and its budgets."""

    experiment: Experiment
    scale: Scale
    backbone: str
    """A model's name or folder, as runs take it."""

    root: Path
    """The folder of all cells."""

    sources: Mapping[str, str | None]
    """The rows of each task, as runs take them; None for the task's own on the Hub."""

    hashes: Mapping[str, str]
    """What tells the rows of each task from others."""

    budgets: Mapping[int, int]
    """Parameters by the LoRA rank that they are."""

    num_parameters: int
    """Of the backbone."""

    is_encoder: bool
    """Whether the backbone reads in both directions and generates nothing."""

    seeds: tuple[int, ...]
    """Of the runs."""

    judged_data: str | None = None
    """The folder of the judge's questions."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The budgets, as LoRA ranks."""
        return tuple(self.budgets)

    def cell(
        self,
        *,
        task: str,
        method: str,
        rank: int,
        seed: int,
        learning_rate: float,
        terms: Terms,
        tested: bool = True,
    ) -> Cell:
        """One run."""
        return Cell(
            backbone=self.backbone,
            task=task,
            method=method,
            rank=rank,
            seed=seed,
            learning_rate=learning_rate,
            options=self._options(task, method, rank, seed, learning_rate, terms),
            rows=self.hashes[task],
            root=str(self.root / "cells"),
            test=self._test() if tested else None,
            alone=self.experiment.kind == "cost",
        )

    def at_one_rate(self, terms: Terms, rates: Mapping[tuple[str, str, int], float]) -> list[Cell]:
        """All runs, tested: every seed of every method at its learning rate.

        Args:
            terms: On what terms.
            rates: By task, method and rank; the scale's own rate where there is none.
        """
        return [
            self.cell(
                task=task,
                method=method,
                rank=rank,
                seed=seed,
                learning_rate=rates.get((task, method, rank), self.scale.learning_rate),
                terms=terms,
            )
            for task, method, rank in self.rows(terms)
            for seed in self.seeds
        ]

    def rows(self, terms: Terms) -> Iterator[tuple[str, str, int]]:
        """Task, method and rank of everything that is compared.

        On fair terms LoRA is there at half, twice and four times the rank as well, where the
        experiment has this ladder.
        """
        experiment = self.experiment
        methods = experiment.methods
        for task in experiment.tasks:
            for method in methods:
                for rank in self.ranks:
                    yield task, method, rank
            if terms == "fair" and experiment.ladder and experiment.kind in ("scores", "judged"):
                steps = [step for r in self.ranks for step in (r // 2, 2 * r, 4 * r) if step]
                there = self.ranks if BASELINE in methods else ()
                for rank in dict.fromkeys((*steps, *self.ranks)):
                    if rank not in there:
                        yield task, BASELINE, rank

    def _options(
        self, task: str, method: str, rank: int, seed: int, learning_rate: float, terms: Terms
    ) -> dict[str, Any]:
        variant = self.experiment.variant(method)
        kind = get_method(variant.method)
        source = self.sources[task]
        options: dict[str, Any] = {
            "task": task,
            **({} if source is None else {"dataset_name": source}),
            "model_name_or_path": self.backbone,
            "method": variant.method,
            "seed": seed,
            "learning_rate": learning_rate,
            "disable_tqdm": True,
            **self.scale.settings,
            **self.experiment.settings,
        }
        names = kind.option_names()
        if "scale" in names and not has_own_scale(kind):
            options["method.scale"] = SCALE_OF_UPDATES
        if "dropout" in names:
            options["method.dropout"] = DROPOUT
        if terms == "paper" and self.scale.sizes == "paper" and rank == DEFAULT_RANK and kind.paper:
            options["paper"] = True
        elif kind.size:
            options["budget"] = self.budget(rank)
        if kind.allocates:
            allocation = {**self.scale.allocation}
            if terms == "fair":
                allocation["budget"] = "parameters"
            assert issubclass(kind, Alora), "what allocates is ALoRA or a kind of it"
            read = read_by(kind().allocation)
            options |= {f"allocation.{name}": v for name, v in allocation.items() if name in read}
        options |= variant.options
        return {name: value for name, value in options.items() if value is not None}

    def budget(self, rank: int) -> int:
        """Parameters of LoRA with this rank."""
        first = next(iter(self.budgets))
        return self.budgets.get(rank, self.budgets[first] * rank // first)

    def _test(self) -> dict[str, Any]:
        if self.experiment.kind == "judged":
            return {"questions": self.judged_data, **self.scale.judged}
        drop = GENERATING if self.is_encoder else ()
        test = {**self.scale.test, **self.experiment.test}
        return {name: v for name, v in test.items() if name not in drop and v is not None}


def make_grid(
    experiment: Experiment,
    scale: Scale,
    *,
    root: Path,
    backbone: str | None = None,
    data: Path | None = None,
    seeds: tuple[int, ...] | None = None,
) -> Grid:
    """Find the backbone, the rows and the budgets of an experiment.

    Args:
        experiment: What is compared.
        scale: How large the runs are.
        root: Where everything is written.
        backbone: A model's name or folder; None for the experiment's own at this scale.
        data: A folder with a folder for each data set; None for those on the Hub or, where nothing
            is to be measured but that it works, rows that are made up.
        seeds: Of the runs; None for the scale's.

    Raises:
        ValueError: There is no such backbone, or rows cannot be loaded.
    """
    from loralloc.runs.models import empty_model, is_encoder

    name = backbone or experiment.backbones.get(scale.name)
    if name is None:
        raise ValueError(
            f"The experiment {experiment.name} names no backbone at the scale {scale.name}; give "
            "one with `--backbone`."
        )
    if data is not None and not data.is_dir():
        raise ValueError(f"`--data` is {data}, which is no folder; name one of data sets.")
    if name in NAMES:
        name = build(name, root / "backbones")
    elif Path(name).is_dir():
        name = str(Path(name).absolute())
    is_smoke = scale.name == "smoke"
    limits, tested = experiment.rows or scale.rows, experiment.kind != "judged"
    bare = [task for task in experiment.tasks if not get_task(task).metrics]
    if bare and tested and limits is None:
        raise ValueError(
            f"The experiment {experiment.name} measures {bare[0]}, which has no test split; give "
            "it `rows`, so that the last of its training rows are one."
        )
    sources = {
        task: rows_of(
            task,
            data=data,
            limits=limits,
            folder=root / "data",
            made=is_smoke,
            shortest=experiment.rows is None,
            tested=tested,
        )
        for task in experiment.tasks
    }
    questions = None
    if experiment.kind == "judged":
        limits = {"test": scale.rows["test"]} if is_smoke and scale.rows else None
        questions = rows_of(
            QUESTIONS, data=data, limits=limits, folder=root / "data", made=is_smoke, shortest=True
        )
        if questions is None:
            raise ValueError(
                f"The experiment {experiment.name} asks the questions of MT-Bench, which no data "
                f"set on the Hub has; put them into a folder {QUESTIONS} of `--data`."
            )
    model = empty_model(name)
    is_papers_sweep = experiment.source and len(experiment.ranks) > 1
    ranks = scale.ranks if is_papers_sweep and scale.ranks else experiment.ranks
    return Grid(
        experiment=experiment,
        scale=scale,
        backbone=name,
        root=root,
        sources=sources,
        hashes={task: hash_of(source) for task, source in sources.items()},
        budgets={rank: Lora().count(model, rank) for rank in ranks},
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_encoder=is_encoder(name),
        seeds=seeds or scale.seeds,
        judged_data=questions,
    )
