"""What inference gains where a shrunk adapter leaves modules alone, without merging anything.

A module that has no rank runs as it did before there was an adapter. SmolLM2-135M reads a batch of
prompts, and writes one token after another,

    frozen      without an adapter
    uniform     with rank 8 on every linear layer of every block
    shrunk      with the ranks that a run left (--run)
    tenth       with one rank on every tenth module

Run: python benchmarks/shrunk.py [--run FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch

from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.record import Record
from loralloc.allocation.resize import resize

NAMES = ("frozen", "uniform", "shrunk", "tenth")
EXAMPLES, LENGTH, NEW_TOKENS = 8, 64, 16


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--run", type=Path, help="a run folder of --method shrink on smollm2-135m")
    args = parser.parse_args(argv)
    names = [name for name in NAMES if name != "shrunk" or args.run]
    models = {name: adapted(args.data, name, args.run) for name in names}
    held = {name: ranks_of(model) for name, model in models.items()}
    modules = {name: len(each) for name, each in held.items()}
    repeats = 5 if args.quick else 15
    seconds = {
        work.__name__: harness.by_turns(
            {name: functools.partial(work, model) for name, model in models.items()},
            repeats=repeats,
        )
        for work in (read, write)
    }
    rows = [
        (
            name,
            modules[name],
            *(1e3 * statistics.median(seconds[work][name]) for work in seconds),
            *(harness.ratio(seconds[work][name], seconds[work]["frozen"]) for work in seconds),
        )
        for name in names
    ]
    harness.show(
        f"smollm2-135m: read {EXAMPLES} x {LENGTH} tokens, write {NEW_TOKENS}",
        ("adapter", "modules", "read ms", "write ms", "read, over frozen", "write, over frozen"),
        rows,
    )
    harness.write(
        args.json,
        {
            "quick": args.quick,
            "modules": modules,
            "ranks": {name: sum(each.values()) for name, each in held.items()},
            "read": [EXAMPLES, LENGTH],
            "written": NEW_TOKENS,
            "over_frozen": {
                work: {name: harness.ratio(each, taken["frozen"]) for name, each in taken.items()}
                for work, taken in seconds.items()
            },
            "seconds": seconds,
        },
    )


def adapted(folder: Path, name: str, run: Path | None) -> Any:
    """The model with a contestant's adapter."""
    task, data = next(iter(harness.data_sets(folder).items()))  # of the run, the model is used only
    model = harness.prepare(task, data, method="lora").model.eval()
    if name == "frozen":
        return model.unload()
    if name == "shrunk":
        resize(model, Record.load(run).ranks)
    elif name == "tenth":
        resize(model, {module: int(i % 10 == 0) for i, module in enumerate(lora_layers(model))})
    return model


def ranks_of(model: Any) -> dict[str, int]:
    """The rank of every adapted module."""
    return ranks(lora_layers(model)) if getattr(model, "peft_config", None) else {}


@torch.no_grad()
def read(model: Any) -> None:
    """One forward pass over a batch of prompts."""
    model(input_ids=ids(), use_cache=False)


@torch.no_grad()
def write(model: Any) -> None:
    """Greedy tokens behind one prompt."""
    model.generate(
        input_ids=ids()[:1],
        attention_mask=torch.ones(1, LENGTH, dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )


@functools.cache
def ids() -> torch.Tensor:
    """The prompts."""
    return torch.randint(0, 1000, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
