"""What a GPU is told to do for one block, forward and backward: counted on a CPU, as the test does.

Every operation below autograd is one, but for those that give out memory or look at it in another
way; products are made as they are where there is a GPU. Ours casts the weights within the pass,
which a model of many blocks does once for all of them.

Run: python benchmarks/operations.py [--json PATH]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import harness

sys.path[:0] = [str(harness.ROOT / "tests"), str(harness.ROOT / "tests" / "kernels")]

from lora_steps import fused_copy  # noqa: E402
from test_launches import MIXED, block, launches_of_a_step  # noqa: E402

from loralloc.kernels import lora, products  # noqa: E402

KINDS = ("float32", "autocast", "bfloat16", "bfloat16, float32 adapter")


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table, write JSON."""
    args = harness.parser(__doc__).parse_args(argv)
    lora.FEW_ROWS, products.mkl_is_slow = (), lambda: False
    counts = {kind: counted(kind) for kind in KINDS}
    over = {kind: found["ours"] / found["peft"] for kind, found in counts.items()}
    harness.show(
        "operations of one block, forward and backward",
        ("", "PEFT", "ours", "ours, mixed ranks", "ours over PEFT"),
        [(kind, *found.values(), over[kind]) for kind, found in counts.items()],
    )
    harness.write(
        args.json,
        {
            "quick": False,
            "operations": counts,
            "ours_over_peft": max(over.values()),
            "mixed_over_uniform": max(of["mixed"] / of["ours"] for of in counts.values()),
        },
    )


def counted(kind: str) -> dict[str, Any]:
    """PEFT's, ours, and ours with ranks of many sizes."""
    model = block(kind)
    return {
        "peft": launches_of_a_step(model, kind),
        "ours": launches_of_a_step(fused_copy(model), kind),
        "mixed": launches_of_a_step(fused_copy(block(kind, rank_pattern=MIXED)), kind),
    }


if __name__ == "__main__":
    main()
