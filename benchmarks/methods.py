"""A training step of the methods that are LoRA with something on its ranks, beside LoRA's.

Gates (SoRA, SaLoRA, ALoRA-DNAS) and AdaLoRA's singular values go into A or B for the step, so that
their layers are the fused function that LoRA's are. Each method takes forward, loss and backward on
one real batch as it trains at first, with PEFT's layers and with ours, and with the ranks that it
begins with: what its schedule and its optimiser do beside that is left out.

Run: python benchmarks/methods.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
from contestants import contestants

METHODS = ("lora", "alora", "alora-dnas", "sora", "salora", "adalora")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    repeats, batch_size = (5, 8) if args.quick else (10, 16)
    task, data = next(iter(harness.data_sets(args.data).items()))
    steps: dict[str, Any] = {}
    trained: dict[str, int] = {}
    for method in METHODS:
        options = {"method": method, "dtype": "bfloat16", "max_steps": 1000}
        run = harness.prepare(task, data, per_device_train_batch_size=batch_size, **options)
        run.model.train()
        if not steps:
            batch = harness.on_device(next(iter(run.trainer.get_train_dataloader())))
        ways = contestants(run.model, batch)
        steps |= {f"{method}, {way}": ways[way] for way in ("peft", "ours")}
        trained[method] = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    seconds = harness.by_turns(steps, repeats=repeats)
    ratios = {
        method: {
            way: harness.ratio(seconds[f"{method}, {way}"], seconds["lora, ours"])
            for way in ("peft", "ours")
        }
        for method in METHODS
    }
    harness.show(
        f"step of smollm2-135m, {task}, bfloat16, batch {list(batch['input_ids'].shape)}, over "
        "LoRA's with our layers",
        ("", "parameters", "PEFT's layers", "ours"),
        [(name, trained[name], each["peft"], each["ours"]) for name, each in ratios.items()],
    )
    shape = list(batch["input_ids"].shape)
    found = {
        "task": task,
        "shape": shape,
        "parameters": trained,
        "over_lora": ratios,
        "seconds": seconds,
    }
    harness.write(args.json, {"quick": args.quick, **found})


if __name__ == "__main__":
    main()
