"""Peak resident memory of LoRA, AdaLoRA (init_r twice the target) and ALoRA.

Short runs of `smollm2-135m` with rounds in them, each in a process of its own: the peak is reached
in the longest batch, which comes first, or in a round, not by training long. glibc is told to map
large blocks, so that what is freed goes back at once and the peak is what was held.

Run: python benchmarks/memory.py [--data FOLDER] [--quick] [--json PATH]
"""

from __future__ import annotations

from collections.abc import Sequence

import harness
from end_to_end import first_task, peak_bytes
from whole_run import CONTESTANTS


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    task, data = first_task(harness.data_sets(args.data))
    repeats = 1 if args.quick else 3
    peaks: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats):
        for name in CONTESTANTS:
            peaks[name].append(peak_bytes(name, task, data))
    over = {name: harness.ratio(peaks[name], peaks["lora"]) for name in CONTESTANTS}
    harness.show(
        f"peak resident memory, smollm2-135m on {task}",
        ("", "GiB", "over LoRA"),
        [(name, max(peaks[name]) / 2**30, over[name]) for name in CONTESTANTS],
    )
    harness.write(
        args.json,
        {
            "quick": args.quick,
            "alora_over_lora_peak_memory": over["alora"],
            "adalora_over_lora_peak_memory": over["adalora"],
            "task": task,
            "peak_bytes": peaks,
        },
    )


if __name__ == "__main__":
    main()
