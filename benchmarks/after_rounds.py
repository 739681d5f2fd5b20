"""A training step after rounds, when every module has a rank of its own.

oneDNN compiles a product for every shape, and keeps it. On batches each of a length not seen
before, a step of SmolLM2-135M in bfloat16 is timed, and the memory that stays behind is measured

    uniform             with one rank everywhere, as LoRA has it
    mixed               with as many ranks, another number in every module
    mixed, unrounded    the same, with the ranks as they are inside the products

Run: python benchmarks/after_rounds.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from processes import MAP_LARGE_BLOCKS

from loralloc.allocation.layers import lora_layers
from loralloc.allocation.resize import resize
from loralloc.allocation.supervised import IGNORED, SupervisedLoss
from loralloc.kernels import packed

NAMES = ("uniform", "mixed", "mixed, unrounded")

RANKS = (3, 5, 8, 11, 13, 6, 10, 8, 4, 12)
"""Of the modules in turn: 8 in the mean, and as far apart as rounds leave them."""

EXAMPLES, SHORTEST = 16, 50
"""Of a batch; and its tokens, in the first turn."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = harness.parser(__doc__)
    parser.add_argument("--kept", choices=NAMES, help="only print the bytes that a length leaves")
    args = parser.parse_args(argv)
    if args.kept:
        sys.stdout.write(f"{kept_bytes(args.data, args.kept)}\n")
        return
    seconds = timed(args.data, repeats=4 if args.quick else 16)
    kept = {name: in_a_process_of_its_own(args.data, name) for name in NAMES}
    over = {name: harness.ratio(taken, seconds["uniform"]) for name, taken in seconds.items()}
    harness.show(
        "a step on a batch of a new length, smollm2-135m, bfloat16",
        ("ranks", "microseconds a token", "over uniform", "MB that stay"),
        [(n, 1e6 * statistics.median(seconds[n]), over[n], kept[n] / 1e6) for n in NAMES],
    )
    harness.write(
        args.json,
        {
            "quick": args.quick,
            "mixed_over_uniform": over["mixed"],
            "unrounded_over_uniform": over["mixed, unrounded"],
            "ranks": RANKS,
            "examples": EXAMPLES,
            "seconds_a_token": seconds,
            "kept_bytes_a_length": kept,
        },
    )


def timed(folder: Path, *, repeats: int) -> dict[str, list[float]]:
    """Seconds a token of forward, loss and backward, the contestants by turns."""
    models = {name: adapted(folder, name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(-1, repeats):
        for place, (name, model) in enumerate(models.items()):
            # No contestant sees a length that another has had compiled; all have the same mean.
            length = SHORTEST + len(NAMES) * (turn + 1) + (place + turn) % len(NAMES)
            _, taken = harness.timed(functools.partial(step, name, model, EXAMPLES, length))
            if turn >= 0:
                seconds[name].append(taken / (EXAMPLES * length))
    return seconds


def in_a_process_of_its_own(folder: Path, name: str) -> int:
    """What `kept_bytes` gives where large blocks are mapped, so that freed ones are not counted."""
    done = subprocess.run(
        [sys.executable, __file__, "--kept", name, "--data", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **MAP_LARGE_BLOCKS},
    )
    return int(done.stdout)


def kept_bytes(folder: Path, name: str) -> int:
    """Resident bytes that a step on one more length leaves behind, mean of 12 lengths."""
    model = adapted(folder, name)
    for _ in range(2):
        step(name, model, 4, 60)
    before = resident_bytes()
    for length in range(30, 42):
        step(name, model, 4, length)
    return (resident_bytes() - before) // 12


def resident_bytes() -> int:
    """Of this process, now; of its memory on the GPU where it has one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def adapted(folder: Path, name: str) -> Any:
    """The model with a contestant's ranks."""
    task, data = next(iter(harness.data_sets(folder).items()))  # of the run, the model is used only
    model = harness.prepare(task, data, dtype="bfloat16", method="lora").model.train()
    if name != "uniform":
        resize(model, dict(zip(lora_layers(model), itertools.cycle(RANKS), strict=False)))
    return model


def step(name: str, model: Any, examples: int, length: int) -> None:
    """Forward, loss at half of the positions, backward."""
    ids = torch.randint(0, 1000, (examples, length), device=model.device)
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    multiple = packed.MULTIPLE
    packed.MULTIPLE = 1 if name == "mixed, unrounded" else multiple
    SupervisedLoss(model)({"input_ids": ids, "labels": labels}).total.backward()
    packed.MULTIPLE = multiple
    for weight in model.parameters():
        weight.grad = None


if __name__ == "__main__":
    main()
