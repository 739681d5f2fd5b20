"""What becomes of new ranks: churn, and how far their first updates move them beside their elders'.

`smollm2-135m` on the first 1,600 rows of E2E with rank 2 on every linear layer, 52 of 420 ranks a
round, one run for every way to treat new ranks:

    paper       they compete in the next round, with zeros in the optimiser's state
    protected   not before they are as old as the first ones were; with their elders' second moments
    potential   with what they could still do; with their elders' second moments

A run whose result is in the output folder is taken as it is. Writes
experiments/results/newborns.json and, from it, the table in docs/alora.md.

Run: python experiments/newborn_runs.py --data FOLDER [--out FOLDER] [--steps N --first N --gap N
     --rounds N] [--only ARM ...] [--page | --runs]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import loralloc
from loralloc import Record, Round
from loralloc.allocation.layers import lora_layers, weights_ab
from loralloc.allocation.optimizer_state import bare_optimizer
from loralloc.experiments.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "newborns.json"
PAGE = ROOT / "docs" / "alora.md"
BEGIN, END = "<!-- newborns -->", "<!-- end of newborns -->"

ARMS = {
    "paper": {},
    "protected": {"newborns": "protected", "new_state": "survivors"},
    "potential": {"newborns": "potential", "new_state": "survivors"},
}
"""Options of the allocation."""

NUM_ROWS, RANKS_PER_ROUND = 1600, 52

RUN = {
    "task": "e2e",
    "model_name_or_path": "smollm2-135m",
    "lora_r": 2,
    "lora_alpha": 4,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "ranks_per_round": RANKS_PER_ROUND,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, collect, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "newborns")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--first", type=int, default=100, help="step of the first round")
    parser.add_argument("--gap", type=int, default=25, help="steps between two rounds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--page", action="store_true", help="only write the table again")
    parser.add_argument("--runs", action="store_true", help="write no table: others run beside")
    args = parser.parse_args(argv)
    if args.data is None and not args.page:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    if not args.page:
        for arm in args.only:
            run(args, arm)
        if args.runs:
            return
        write_results(args)
    write_table(json.loads(RESULTS.read_text(encoding="utf-8")))


def run(args: argparse.Namespace, arm: str) -> None:
    """One run, unless its result is there."""
    from loralloc.runs.quiet import prepare_process

    folder = args.out / arm
    kept = folder / "result.json"
    if kept.is_file():
        return
    prepare_process()
    places = [args.first + args.gap * number for number in range(args.rounds)]
    where = {
        "dataset_name": str(rows(args)),
        "output_dir": str(folder),
        "max_steps": args.steps,
        "rounds_at": places,
    }
    watch = FirstUpdates()
    prepared = loralloc.prepare(
        {**RUN, **where, **ARMS[arm]}, overwrite=True, on_round=watch.begin_with
    )
    watch.model = prepared.method.model
    prepared.trainer.add_callback(watch)
    loralloc.train(prepared)
    record = prepared.allocation.record
    result = {
        "arm": arm,
        "steps": args.steps,
        "rounds_at": places,
        "churn": [entry.churn for entry in record.rounds],
        "pruned_again": pruned_again(record),
        "updates": watch.updates,
        "round_seconds": [entry.seconds for entry in record.rounds],
        "packages": packages(),
        "device": device(),
    }
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def rows(args: argparse.Namespace) -> Path:
    """A folder with the first rows of E2E to train on, and its development rows."""
    source, folder = args.data / "e2e_nlg", args.out / "data"
    for split, count in (("train", NUM_ROWS), ("validation", None)):
        with (source / f"{split}.jsonl").open(encoding="utf-8") as lines:
            text = "".join(islice(lines, count))
        write_text(folder / f"{split}.jsonl", text)  # in one step: another arm may be reading
    return folder


def pruned_again(record: Record) -> float:
    """Share of all ranks that rounds gave which a later round took back, up to the last."""
    given = sum(sum(entry.added.values()) for entry in record.rounds)
    stay = sum(born > 0 for of in record.births().values() for born in of)
    return 1 - stay / given if given else 0.0


class FirstUpdates(TrainerCallback):  # type: ignore[misc]
    """How far a step moves the newest ranks, over how far it moves the others of their modules.

    Root mean square over the elements of A's rows (or B's columns) of all modules that received in
    the last round, in every step until the next.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.updates: list[list[dict[str, float]]] = []
        """Of every round, and every step after it, the ratio of "A" and of "B"."""
        self._added: Mapping[str, int] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def begin_with(self, entry: Round) -> None:
        """Look at the ranks that this round gave."""
        self._added = entry.added
        self.updates.append([])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the optimiser's steps."""
        optimizer = bare_optimizer(kwargs["optimizer"])
        assert optimizer is not None
        optimizer.register_step_pre_hook(lambda *_: self._remember())
        optimizer.register_step_post_hook(lambda *_: self._compare())

    def _remember(self) -> None:
        self._before = {
            name: (a.detach().clone(), b.detach().t().clone()) for name, a, b in self._received()
        }

    def _compare(self) -> None:
        if not self._before:
            return
        squares: dict[str, dict[str, list[Tensor]]] = {
            part: {"new": [], "old": []} for part in "AB"
        }
        for name, a, b in self._received():
            count = self._added[name]
            now = (a.detach(), b.detach().t())
            for part, weight, before in zip("AB", now, self._before[name], strict=True):
                moved = (weight - before).square()
                squares[part]["new"].append(moved[-count:].flatten())
                squares[part]["old"].append(moved[:-count].flatten())
        self.updates[-1].append(
            {
                part: float((torch.cat(of["new"]).mean() / torch.cat(of["old"]).mean()).sqrt())
                for part, of in squares.items()
            }
        )

    def _received(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        layers = lora_layers(self.model)
        chosen = {name: layers[name] for name in self._added if name in layers}
        for name, (a, b) in weights_ab(chosen).items():
            yield name, a, b


def write_results(args: argparse.Namespace) -> None:
    """Collect every run's result."""
    found = [args.out / arm / "result.json" for arm in ARMS]
    runs = [json.loads(path.read_text("utf-8")) for path in found if path.is_file()]
    where = {
        name: runs[0].get(name, here) if runs else here
        for name, here in (("packages", packages()), ("device", device()))
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**where, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def packages() -> dict[str, str]:
    """Versions of what the runs ran with."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl")}


def device() -> str:
    """What the runs ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write_table(data: dict[str, Any]) -> None:
    """The table between the two marks of docs/alora.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([before + BEGIN, *table(data), END + after]), encoding="utf-8")


def table(data: dict[str, Any]) -> list[str]:
    """The runs as a table in Markdown, with what they are."""
    if not data["runs"]:
        return []
    first = data["runs"][0]
    places = first["rounds_at"]
    gaps = {after - before for before, after in pairwise(places)}
    lines = [
        f"`smollm2-135m` on {NUM_ROWS:,} rows of E2E, rank 2 on every linear layer (420 ranks), "
        f"{RANKS_PER_ROUND} a",
        f"round, {len(places)} rounds from step {places[0]} on, {min(gaps)} steps apart, "
        f"{first['steps']} steps of 16 rows, learning",
        f"rate 2e-3, one seed ({data['device']}):",
        "",
        "| new ranks | churn | gone by the end | largest update of A, of B |",
        "|---|---:|---:|---:|",
    ]
    for each in data["runs"]:
        churn = [value for value in each["churn"] if value is not None]
        most = {
            part: max(step[part] for steps in each["updates"] for step in steps) for part in "AB"
        }
        options = ARMS[each["arm"]]
        name = (
            ", ".join(f'`{key}="{value}"`' for key, value in options.items()) or "as in the paper"
        )
        lines.append(
            f"| {name} | {sum(churn) / len(churn):.0%} | {each['pruned_again']:.0%} | "
            f"{most['A']:.2f}, {most['B']:.2f} |"
        )
    return [
        *lines,
        "",
        "Churn is the mean over the rounds, beside it the share of all ranks given that are pruned",
        "by the end. An update is that of new ranks over that of the others of their modules, root",
        "mean square, the largest of any step before the next round.",
    ]


if __name__ == "__main__":
    main()
