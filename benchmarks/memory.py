"""Peak resident memory of LoRA, AdaLoRA (init_r twice the target) and ALoRA.

What is held, of `smollm2-135m`: short runs with a round in them, each in a process of its own. The
peak is reached in the longest batch, which comes first, or in the round, not by training long.
glibc is told to map large blocks, so that what is freed goes back at once.

What stays beyond that, without `--quick`: LoRA and ALoRA over 96 steps with 8 rounds, by turns,
with the allocator as it comes (glibc's) and with tcmalloc where it is installed (Debian and Ubuntu:
libtcmalloc-minimal4).

Run: python benchmarks/memory.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Sequence
from typing import Any

import harness
from processes import begin, finish, peak_bytes
from whole_run import CONTESTANTS

LONGER = {"max_steps": 96, "num_rounds": 8, "warmup_epochs": 0.027, "recovery_epochs": 0.0134}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    task, data = harness.first_task(harness.data_sets(args.data))
    peaks = {name: peak_bytes(name, task, data) for name in CONTESTANTS}
    over = {name: peak / peaks["lora"] for name, peak in peaks.items()}
    harness.show(
        f"memory held, smollm2-135m on {task}",
        ("", "GiB", "over LoRA"),
        [(name, peaks[name] / 2**30, over[name]) for name in CONTESTANTS],
    )
    result: dict[str, Any] = {
        "quick": args.quick,
        "alora_over_lora_peak_memory": over["alora"],
        "adalora_over_lora_peak_memory": over["adalora"],
        "task": task,
        "peak_bytes": peaks,
    }
    if not args.quick:
        result["allocators"] = by_allocator(task, data)
        for name, runs in result["allocators"].items():
            harness.show(
                f"{runs['lora']['steps']} steps with {name}",
                ("", "seconds", "GiB"),
                [(method, r["seconds"], r["peak_bytes"] / 2**30) for method, r in runs.items()],
            )
    harness.write(args.json, result)


def by_allocator(task: str, data: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What longer runs of LoRA and ALoRA took with each allocator that is there."""
    library = ctypes.util.find_library("tcmalloc_minimal")
    environments = {"glibc": {}, **({"tcmalloc": {"LD_PRELOAD": library}} if library else {})}
    runs = {
        (name, method): begin(method, task, data, "smollm2-135m", LONGER, environment=environment)
        for name, environment in environments.items()
        for method in ("lora", "alora")
    }
    taken = finish(runs)
    return {
        name: {method: taken[name, method] for method in ("lora", "alora")} for name in environments
    }


if __name__ == "__main__":
    main()
