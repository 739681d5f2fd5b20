"""A training step after rounds, when every module has a rank of its own.

oneDNN compiles a product for every shape, and keeps it. On batches each of a length not seen
before, a step of SmolLM2-135M in bfloat16 is timed

    uniform             with one rank everywhere, as LoRA has it
    mixed               with as many ranks, another number in every module
    mixed, unrounded    the same, with the ranks as they are inside the products

Run: python benchmarks/after_rounds.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import harness
import torch

from loralloc.allocation.layers import lora_layers
from loralloc.allocation.resize import resize
from loralloc.allocation.supervised import SupervisedLoss
from loralloc.kernels import lora

RANKS = (3, 5, 8, 11, 13, 6, 10, 8, 4, 12)
"""Of the modules in turn: 8 in the mean, and as far apart as rounds leave them."""

EXAMPLES, SHORTEST = 16, 50
"""Of a batch; and its tokens, in the first turn."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    seconds = measure(*first_task(args.data), repeats=4 if args.quick else 16)
    over = {name: harness.ratio(taken, seconds["uniform"]) for name, taken in seconds.items()}
    harness.show(
        "a step on a batch of a new length, smollm2-135m, bfloat16",
        ("ranks", "microseconds a token", "over uniform"),
        [(name, 1e6 * statistics.median(s), over[name]) for name, s in seconds.items()],
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
        },
    )


def first_task(folder: Any) -> tuple[str, str]:
    """Whose rows are at hand; only the model is taken from the run."""
    return next(iter(harness.data_sets(folder).items()))


def measure(task: str, data: str, *, repeats: int) -> dict[str, list[float]]:
    """Seconds a token of forward, loss and backward, the contestants by turns."""
    flags = ("--dtype", "bfloat16", "--method", "lora")
    models = {name: harness.prepare(task, data, *flags).model for name in ("uniform", "mixed")}
    resize(models["mixed"], dict(zip(lora_layers(models["mixed"]), itertools.cycle(RANKS))))
    models["mixed, unrounded"] = models["mixed"]
    losses = {name: SupervisedLoss(model.train()) for name, model in models.items()}
    multiple = lora.MULTIPLE
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, repeats):
        for place, (name, loss) in enumerate(losses.items()):
            # No contestant sees a length that another has had compiled; all have the same mean.
            length = SHORTEST + len(losses) * (turn + 1) + (place + turn) % len(losses)
            ids = torch.randint(0, 1000, (EXAMPLES, length))
            batch = {"input_ids": ids, "labels": ids.clone()}
            batch["labels"][:, : length // 2] = -100
            lora.MULTIPLE = 1 if name.endswith("unrounded") else multiple
            _, taken = harness.timed(lambda: loss(batch).total.backward())  # noqa: B023
            lora.MULTIPLE = multiple
            models[name].zero_grad()
            if turn >= 0:
                seconds[name].append(taken / ids.numel())
    return seconds


if __name__ == "__main__":
    main()
