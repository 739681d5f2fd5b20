"""Every method at its best learning rate on SST-2 and QNLI, and the page that tells what came out.

For each task and each row of the table the learning rate is searched for over equally many values
around the one that the method recommends, by the development loss of one seed; the best is then
trained and tested with others. Every run is a process of its own and leaves one JSON file; what is
there is not run again, so the command may be stopped and given again at any time.

Run: python experiments/method_runs.py --data FOLDER [--only ROW ...] [--max-runs N] [--page]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.cli.methods import papers_count, papers_shape
from loralloc.experiments.cell import Cell
from loralloc.experiments.files import read_json, write_json
from loralloc.experiments.work import attempt
from loralloc.methods.catalog import METHODS, get_method, learning_rates

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "methods"
PAGE = ROOT / "docs" / "methods.md"

MODEL, TASKS = "minilm-l6", ("sst2", "qnli")
STEPS, BATCH = 1500, 16
TRIALS, SEARCH_SEED, SEEDS = 5, 0, (1, 2, 3)
RANK = 8
"""Of the LoRA whose parameters are the budget."""

NEEDS_A_FILE = ("pattern",)
"""Methods that are told by a file what to be, so that there is nothing to compare yet."""

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS if name not in NEEDS_A_FILE},
    "adalora, s = 2": ("adalora", {"method.scale": 2.0}),
    "p-tuning-v2, 20 tokens": ("p-tuning-v2", {"method.native": True}),
    "parallel-adapter, s = 4 in the FFN": ("parallel-adapter", {"method.ffn_scale": 4.0}),
    "adapterdrop, no block dropped": ("adapterdrop", {"method.dropped_at_test": 0}),
}
"""Rows of the table: a method, and its options where they are not its own."""

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

Results = Mapping[str, Any]
"""What the JSON of one run holds."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where results are, and how long its runs are."""

    data: Path | None
    out: Path
    results: Path
    steps: int
    trials: int
    seeds: tuple[int, ...]

    def cell(self, task: str, row: str, rate: float, seed: int, *, tested: bool) -> Cell:
        """One run."""
        method, own = ROWS[row]
        assert self.data is not None, "runs need data"
        options = {
            "task": task,
            "dataset_name": str((self.data / task).absolute()),
            "model_name_or_path": MODEL,
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            "max_steps": self.steps,
            "per_device_train_batch_size": BATCH,
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            **own,
        }
        return Cell(
            backbone=MODEL,
            task=task,
            method=method,
            rank=RANK,
            seed=seed,
            learning_rate=rate,
            options=options,
            root=str(self.out),
            test={} if tested else None,
            alone=True,
        )

    def kept(self, task: str, row: str, rate: float, seed: int, *, tested: bool) -> Path:
        """The file of a run's result."""
        words = "".join(c if c.isalnum() or c == "-" else "_" for c in row)
        kind = "test" if tested else "search"
        return self.results / task / words / f"{kind}-{self.steps}-lr{rate:g}-seed{seed}.json"

    def rates(self, row: str) -> list[float]:
        """Those that are searched among."""
        return learning_rates(get_method(ROWS[row][0]).about, self.trials)

    def searched(self, task: str, row: str) -> dict[float, float]:
        """Development loss by learning rate, as far as it is known; infinite where a run failed."""
        found = {}
        for rate in self.rates(row):
            result = read_json(self.kept(task, row, rate, SEARCH_SEED, tested=False))
            if result is not None:
                found[rate] = result.get("dev_loss", float("inf"))
        return found

    def best_rate(self, task: str, row: str) -> float | None:
        """The rate of the lowest loss, once all are known; None before, or where all failed."""
        found = self.searched(task, row)
        if len(found) < self.trials or min(found.values()) == float("inf"):
            return None
        return min(found, key=found.__getitem__)

    def tested(self, task: str, row: str) -> list[Results]:
        """Results of the best rate that have been tested."""
        rate = self.best_rate(task, row)
        if rate is None:
            return []
        found = [read_json(self.kept(task, row, rate, s, tested=True)) for s in self.seeds]
        return [result for result in found if result is not None and "test" in result]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "methods", help="run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON a run")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trials", type=int, default=TRIALS, help="learning rates, an odd number")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--max-runs", type=int, help="stop after so many")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        sys.stdout.write("\n" + json.dumps(carried_out(Cell.from_data(args.worker))) + "\n")
        return
    if args.data is None and not args.page:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    study = Study(
        data=args.data and Path(args.data),
        out=args.out,
        results=args.results,
        steps=args.steps,
        trials=args.trials,
        seeds=tuple(args.seeds),
    )
    if not args.page:
        runs = missing(study, args.tasks, args.only, retry=args.retry)
        for number, (cell, kept) in enumerate(runs, start=1):
            print(f"{number}: {cell.name}", flush=True)  # noqa: T201 - for whoever waits
            write_json(kept, in_a_process_of_its_own(cell))
            if number == args.max_runs:
                break
    if not args.no_page:
        PAGE.write_text(page(study), encoding="utf-8")


def missing(
    study: Study, tasks: Sequence[str], rows: Sequence[str], *, retry: bool
) -> Iterator[tuple[Cell, Path]]:
    """Runs that are still to be made, and where their results belong; the search comes first."""
    for task in tasks:
        for row in rows:
            todo = [(rate, SEARCH_SEED, False) for rate in study.rates(row)]
            yield from _not_there(study, task, row, todo, retry=retry)
            best = study.best_rate(task, row)  # known by now, unless every run failed
            if best is not None:
                todo = [(best, seed, True) for seed in study.seeds]
                yield from _not_there(study, task, row, todo, retry=retry)


def _not_there(
    study: Study, task: str, row: str, runs: Sequence[tuple[float, int, bool]], *, retry: bool
) -> Iterator[tuple[Cell, Path]]:
    for rate, seed, tested in runs:
        kept = study.kept(task, row, rate, seed, tested=tested)
        found = read_json(kept)
        if found is None or (retry and "failure" in found):
            yield study.cell(task, row, rate, seed, tested=tested), kept


def in_a_process_of_its_own(cell: Cell) -> Results:
    """What `carried_out` gives, from a process whose memory is the run's alone."""
    words = [sys.executable, __file__, "--worker", json.dumps(cell.as_data())]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or ["it was killed"])[-1]}
    found: Results = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def carried_out(cell: Cell) -> Results:
    """Train, and test where it is to be tested; what is worth keeping of it."""
    from loralloc.runs.quiet import prepare_process

    prepare_process()
    outcome = attempt(cell)
    if outcome.result is None:
        return {"failure": outcome.failure}
    result = outcome.result
    names = ("size", "parameters", "findings", "search_steps", "steps", "dev_loss", "seconds")
    kept = {name: result[name] for name in (*names, "peak_bytes", "versions")}
    kept |= {"learning_rate": cell.learning_rate, "seed": cell.seed, "options": cell.options}
    if result["test"] is not None:
        (figure, *_) = result["test"]["figures"]
        kept["test"] = {
            figure["name"]: figure["value"],
            "cross_entropy": result["test"]["cross_entropy"],
            "num_examples": result["test"]["num_examples"],
        }
    kept["options"] = {k: v for k, v in cell.options.items() if k != "dataset_name"}
    return kept


def page(study: Study) -> str:
    """docs/methods.md."""
    lines = [*INTRODUCTION, *_methods()]
    tables: list[str] = []
    for task in TASKS:
        rows = {row: found for row in ROWS if (found := study.tested(task, row))}
        if rows:
            examples = f"{study.steps:,} steps of {BATCH} examples"
            tables += ["", f"## {task}, {MODEL}, {examples}", "", *_table(study, rows)]
    found = [*tables, *NOTES] if tables else NONE_YET
    return "\n".join([*lines, *found, *_counts()]) + "\n"


def _table(study: Study, rows: Mapping[str, Sequence[Results]]) -> list[str]:
    lora = rows.get("lora")
    lines = [
        "| method | learning rate | test accuracy | test cross-entropy | parameters kept | "
        "of the budget | steps that search | what its gates did | seconds a step over LoRA |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row, runs in rows.items():
        rate = runs[0]["learning_rate"]
        edge = " (edge)" if rate in (study.rates(row)[0], study.rates(row)[-1]) else ""
        stored = [run["parameters"]["stored"] for run in runs]
        over = [run["parameters"]["over_budget"] for run in runs]
        beside = "-" if None in over else f"{statistics.mean(over):+.1%}"
        seconds = f"{_step(runs) / _step(lora):.2f}" if lora else "-"
        lines.append(
            f"| {row} | {rate:g}{edge} | {_spread(runs, 'accuracy', 1)} | "
            f"{_spread(runs, 'cross_entropy', 4)} | {statistics.mean(stored):,.0f} | {beside} | "
            f"{runs[0]['search_steps'] or '-'} | {_found(runs)} | {seconds} |"
        )
    return lines


def _spread(runs: Sequence[Results], name: str, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    values = [run["test"][name] for run in runs]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _step(runs: Sequence[Results]) -> float:
    return statistics.median(run["seconds"] / run["steps"] for run in runs)


def _found(runs: Sequence[Results]) -> str:
    """Means of what the method found, such as the overlap with the draw."""
    names = runs[0]["findings"]
    means = {name: statistics.mean(run["findings"][name] for run in runs) for name in names}
    words = [f"{name.replace('_', ' ')} {mean:.3f}" for name, mean in means.items()]
    return ", ".join(words) or "-"


def _methods() -> list[str]:
    """What every method is and how it differs from its paper."""
    lines = [
        "",
        "| method | paper | algorithm | begins | settings | merges | learning rate | "
        "what differs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        about = get_method(name).about
        merges = "yes" if about.merges else "no"
        rate = f"{about.learning_rate:g}: {about.rate_from}" if about.learning_rate else "-"
        lines.append(
            f"| `{name}` | {about.paper} | {about.status} | {about.initialisation or '-'} | "
            f"{about.settings or '-'} | {merges} | {rate} | {about.differs or '-'} |"
        )
    return lines


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
    "How they compare at learning rates of their own is what `python experiments/method_runs.py",
    "--data DATA` measures, hours long, and writes here; there are no results yet.",
)

NOTES = (
    "",
    "Written by `python experiments/method_runs.py --data DATA` from the JSON of every run in",
    f"`experiments/results/methods`. Learning rates: {TRIALS} for every row, half powers of ten",
    'around the recommended one, by development loss with one seed; "edge" where the best is the',
    f"first or the last. Then {len(SEEDS)} other seeds: mean and standard deviation on the test",
    "split. Every row trains for as many steps; those of a search come on top. Overlap with draw:",
    "the share of the kept ranks that SoRA's initial gates alone would have kept, at random about",
    "0.5. Density: how dense SaLoRA was just before it was pruned. Methods of triplets (AdaLoRA",
    "and its kin) and DoRA run PEFT's own step, the others on LoRA the fused one, gates included.",
    "Seconds are of a machine that did other work too.",
)


if __name__ == "__main__":
    main()
