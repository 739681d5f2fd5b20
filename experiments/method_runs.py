"""Every method trained and tested on SST-2 at one budget, and the page that tells what came out.

Each run is a process of its own: `loralloc train`, then `loralloc eval`; a run whose result is in
the output folder is taken as it is. Writes experiments/results/methods.json and, from it,
docs/methods.md.

Run: python experiments/method_runs.py --data FOLDER [--out FOLDER] [--only METHOD ...] [--page]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import loralloc
from loralloc.cli.methods import papers_count, papers_shape
from loralloc.methods.catalog import METHODS, get_method

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"

MODELS = {"minilm-l6": (300, 16), "smollm2-135m": (48, 8)}
"""Backbones; steps of every run, and examples of a step."""

LONGER = {"smollm2-135m": {"lst": 240}}
"""Methods that do not get past the untuned model in so few steps, and the steps of a second run."""

RATE = 1e-3
RATES = {"p-tuning-v2": 1e-2, "lst": 3e-3, "full": 1e-4}
"""Learning rates: prefixes and side networks want more than the rest, as in their own papers, and
full fine-tuning less. They were not searched for."""

TEST = {"minilm-l6": (), "smollm2-135m": ("--decode", "labels", "--limit", "200")}
"""How the test split is predicted: a language model chooses the most probable label."""

NUM_EXAMPLES = 6000

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


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, collect, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("LORALLOC_DATA"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        train(args.worker)
        return
    if args.data is None and not args.page:
        parser.error("name the folder of the data sets with --data or LORALLOC_DATA")
    if not args.page:
        for model in MODELS:
            for method in args.only:
                run(args, model, method, MODELS[model][0])
            for method, steps in LONGER.get(model, {}).items():
                run(args, model, method, steps)
        untuned(args)
        write_results(args)
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def train(options: Mapping[str, Any]) -> None:
    """Train in this process, and print what it took."""
    from loralloc.cli.progress import prepare_process

    prepare_process()
    run = loralloc.prepare(options)
    method = run.method
    begin, number = time.perf_counter(), method.num_trained()
    loralloc.train(run)
    result = {
        "seconds": time.perf_counter() - begin,
        "steps": run.trainer.state.global_step,
        "trained": number,
        "stored": method.num_stored(),
        "size": {method.size: method.chosen_size()},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def run(args: argparse.Namespace, model: str, method: str, steps: int) -> dict[str, Any]:
    """One run's result, from its folder or by running it."""
    usual, batch = MODELS[model]
    folder = args.out / model / (method if steps == usual else f"{method}-{steps}")
    rate = RATES.get(method, RATE)
    kept = folder / "result.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    options = {
        "task": "sst2",
        "dataset_name": str(args.data / "sst2"),
        "model_name_or_path": model,
        "method": method,
        "learning_rate": rate,
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "output_dir": str(folder),
        "disable_tqdm": True,
        **(rounds(model) if get_method(method).allocates else {}),
    }
    # A process of its own, so that its peak memory is its own.
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(options)],
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    command("eval", str(folder), *TEST[model], "--output_dir", str(folder / "eval"))
    result |= {"model": model, "method": method, "learning_rate": rate, "test": tested(folder)}
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def rounds(model: str) -> dict[str, float]:
    """Eight rounds in the first two thirds of the run."""
    steps, batch = MODELS[model]
    epochs = steps * batch / NUM_EXAMPLES
    warmup, recovery = round(epochs / 4, 4), round(epochs / 20, 4)
    return {"num_rounds": 8, "warmup_epochs": warmup, "recovery_epochs": recovery}


def untuned(args: argparse.Namespace) -> None:
    """The language model as it was; an encoder's head is drawn at random and says nothing."""
    folder, first = args.out / "smollm2-135m" / "untuned", args.out / "smollm2-135m"
    if (first / "lora").is_dir() and not (folder / "eval.json").is_file():
        flags = ("--base", *TEST["smollm2-135m"], "--output_dir", str(folder))
        command("eval", str(first / "lora"), *flags)


def tested(folder: Path) -> dict[str, Any]:
    """Accuracy on the test split, in per cent, and of how many examples."""
    found = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    return {"accuracy": found["figures"][0]["value"], "num_examples": found["num_examples"]}


def write_results(args: argparse.Namespace) -> None:
    """Collect every run's result."""
    results = [json.loads(path.read_text("utf-8")) for path in args.out.glob("*/*/result.json")]
    base = args.out / "smollm2-135m" / "untuned" / "eval.json"
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    data = {
        "packages": packages,
        "untuned": json.loads(base.read_text("utf-8"))["figures"][0]["value"]
        if base.is_file()
        else None,
        "runs": sorted(
            results, key=lambda r: (r["model"], list(METHODS).index(r["method"]), r["steps"])
        ),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """docs/methods.md."""
    lines = [*INTRODUCTION, *_methods()]
    for model, (steps, batch) in MODELS.items():
        runs = [r for r in data["runs"] if r["model"] == model]
        if not runs:
            continue
        lines += ["", f"## SST-2, {model}, {steps} steps of {batch} examples", "", *_table(runs)]
        if model == "smollm2-135m" and data["untuned"] is not None:
            lines += ["", f"Untuned, with labels scored as well: {data['untuned']:.1f}."]
    return "\n".join([*lines, *NOTES, *_counts()]) + "\n"


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


def _table(runs: Sequence[dict[str, Any]]) -> list[str]:
    lora = next((r for r in runs if r["method"] == "lora"), None)
    lines = [
        "| method | size | parameters trained | stored | learning rate | "
        "test accuracy | seconds a step | over LoRA | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        ((name, size),) = run["size"].items()
        step = run["seconds"] / run["steps"]
        over = f"{step / (lora['seconds'] / lora['steps']):.2f}" if lora else "-"
        chosen = f"{name} {size}" if name else "-"
        more = "" if run["steps"] == MODELS[run["model"]][0] else f", {run['steps']} steps"
        lines.append(
            f"| {run['method']}{more} | {chosen} | {run['trained']:,} | {run['stored']:,} | "
            f"{run['learning_rate']:g} | {run['test']['accuracy']:.1f} | "
            f"{step:.3f} | {over} | {run['peak_bytes'] / 2**30:.2f} |"
        )
    return lines


def _methods() -> list[str]:
    """What every method is and how it differs from its paper."""
    lines = ["", "| method | paper | status | merges | what differs |", "|---|---|---|---|---|"]
    for name in METHODS:
        about = get_method(name).about
        merges = "yes" if about.merges else "no"
        lines.append(
            f"| `{name}` | {about.paper} | {about.status} | {merges} | {about.differs or '-'} |"
        )
    return lines


INTRODUCTION = (
    "# Methods",
    "",
    "Every method of the paper's Table 1 and its two ablation variants, later competitors and",
    "controls, by `--method NAME`, at one budget (`--budget N`; by default the parameters of LoRA",
    "with rank 8 on every linear layer of every block) or at the size of the paper's comparison",
    "(`--paper`). `loralloc methods --model MODEL` counts them for a model. Faithful: as",
    "published. Port: moved to other backbones. Reconstruction: rebuilt from the paper's words,",
    "where no code was ever published. Control: what the others have to be better than.",
    "Ours: of no paper.",
)

NOTES = (
    "",
    "Written by `python experiments/method_runs.py --data DATA` from",
    "`experiments/results/methods.json`. One seed each, few steps, and a slice of the",
    "data: the tables show that every method trains and",
    "what it costs, not which is better. Parameters are at step 0, and what one task keeps, both",
    "without the head. Learning rates were not searched for. Methods that search (ssp, spt,",
    "learned-adapter) do so in the first quarter of the steps. On `smollm2-135m` the test is the",
    "first 200 rows, by the most probable label.",
    "",
    "Seconds are of two cores that did other work as well, some runs more than others: they are",
    "rough. They hold everything between the first step and the last, so for ALoRA eight rounds,",
    "which in 48 steps are most of it; [performance](performance.md) has what a round costs.",
    "",
    "`lst` on `smollm2-135m` is no better than the untuned model after 48 steps: its side network",
    "takes the place of the last block's output and begins far from it (loss 12 against 6). With",
    "more steps it learns.",
)


def command(*arguments: str) -> None:
    """Run a verb of loralloc as a user does."""
    subprocess.run(
        [sys.executable, "-m", "loralloc", *arguments], check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
