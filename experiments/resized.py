"""What an adapter loses when a share of its parameters goes: by importance, or by singular values.

An adapter for E2E is resized both ways, as by `loralloc resize`, to each share of its parameters;
held-out loss before and after, on the same examples.

Run: python experiments/resized.py ADAPTER --data FOLDER [--shares X ...] [--examples N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from loralloc.adapters.folder import read_adapter
from loralloc.runs.quiet import prepare_process
from loralloc.runs.resizing import WAYS, Target, resize_folder

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "resized.json"


def main() -> int:
    """Resize, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="a run or checkpoint of LoRA on E2E")
    parser.add_argument("--data", type=Path, required=True, help="E2E's folder")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--examples", type=int, default=64)
    args = parser.parse_args()
    prepare_process()
    modules = read_adapter(args.adapter).modules.values()
    parameters = sum(module.a.numel() + module.b.numel() for module in modules)
    result: dict[str, Any] = {
        "ranks": sum(module.rank for module in modules),
        "parameters": parameters,
        "examples": args.examples,
        "cuts": [],
    }
    state = args.adapter / "trainer_state.json"
    if state.is_file():
        result["steps"] = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    for share in args.shares:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as scratch:
                done = resize_folder(
                    args.adapter,
                    Target(params=int(share * parameters)),
                    data=["--task", "e2e", "--dataset_name", str(args.data)],
                    by=way,
                    output=Path(scratch) / "new",
                    judging_examples=args.examples,
                )
            assert done.losses is not None
            before, after = (round(loss, 4) for loss in done.losses)
            kept = sum(rank > 0 for rank in done.after.values())
            found = {"share": share, "by": way, "before": before, "after": after, "modules": kept}
            result["cuts"].append(found)
            sys.stdout.write(f"{found}\n")
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
