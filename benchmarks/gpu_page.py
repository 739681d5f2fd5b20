"""The section of docs/performance.md on GPUs, from the JSON of gpu.py and of operations.py.

What no GPU has measured is said to be so.
"""

from __future__ import annotations

from typing import Any

ROWS = (
    ("long.ours_over_floor", "7B shape, 4 x 1,024: ours over the frozen model", 1.02),
    ("liger.ours_over_floor", "the same with Liger's parts, over the same with them", None),
    ("liger_over_floor", "the same with Liger's parts, over the stock frozen model", 0.85),
    ("short.ours_over_peft", "7B shape, 16 x 72: ours over PEFT, supervised logits", 0.80),
    ("small.ours_over_peft", "135M shape, 16 x 72: ours over PEFT, supervised logits", 0.70),
    ("short.graphed_over_peft", "7B shape, 16 x 72: ours with CUDA graphs over PEFT", 0.80),
    ("small.graphed_over_peft", "135M shape, 16 x 72: ours with CUDA graphs over PEFT", 0.70),
    ("small.graphed_over_ours", "the same over ours without them", None),
    ("compiled.eager_over_compiled", "the same, eager over `reduce-overhead`", None),
    ("long.memory_ours_over_peft", "memory beyond the model, 4 x 1,024: ours over PEFT", 0.60),
    ("liger_memory_over_peft", "the same with Liger's parts, over stock PEFT", 0.48),
    ("halves.autocast.ours_over_peft", "135M, a step under autocast: ours over PEFT", None),
    ("halves.bfloat16.ours_over_peft", "135M, a step in bfloat16: ours over PEFT", None),
    ("halves.fp16.ours_over_peft", "135M, a step in float16, GradScaler: ours over PEFT", None),
    ("halves.autocast.graphed_over_peft", "135M, autocast: ours with CUDA graphs over PEFT", None),
    ("halves.bfloat16.graphed_over_peft", "135M, bfloat16: ours with CUDA graphs over PEFT", None),
    ("halves.fp16.graphed_over_peft", "135M, float16: ours with CUDA graphs over PEFT", None),
    ("mixed.mixed_over_uniform", "7B, a step with mixed ranks over one with 8 everywhere", 1.03),
    ("round.round_over_training", "7B, a round over training on as many examples", 1.6),
    ("round.memory_round_over_training", "peak memory of rounds over training", 1.005),
    ("launches.ours_over_peft", "kernels of one block, forward and backward: ours over PEFT", 0.8),
)
"""Where each figure is in the JSON, what it is, and its bar, which none may be above."""

REMARKS = (
    "On long batches the step is the frozen model's. On short ones a GPU waits to be told of its "
    "kernels, whoever tells it of them: there `use_cuda_graphs(trainer)`, or `loralloc train "
    "--cuda_graphs true`, has the blocks replayed. Recordings are made when a length of batch "
    "comes for the second time (`recording_s` in the JSON) and anew after a round.",
    "",
    "What is above its bar: a round scores at two points, each a forward and a backward pass over "
    "the examples, and training takes one of each, so that a ratio of 2 is what the passes alone "
    "come to where both wait to be told of kernels. Mixed ranks take as many kernels as equal "
    "ones; the seconds of such steps differ by a third from one to the next. Of the memory beyond "
    "the model the input of every linear layer is the most, which the gradient of A needs. After "
    "these measurements logits came to be held 128 MiB at a time, not 512, gradients of a scoring "
    "pass are let go before the next, and a round enters evaluation mode once.",
)
"""What the table does not say."""


def section(results: dict[str, dict[str, Any]]) -> list[str]:
    """The section, line by line."""
    lines = ["## On a GPU", "", *operations(results.get("operations")), ""]
    found = results.get("gpu", {})
    card = found.get("machine", {}).get("gpu")
    if card is None:
        lines.append(
            "Not measured: no GPU was at hand for this version. `python benchmarks/gpu.py --json "
            "benchmarks/results/gpu.json` measures every row on a machine that has one."
        )
    else:
        quick = " --quick" if found["quick"] else ""
        lines.append(
            f"`python benchmarks/gpu.py{quick} --json benchmarks/results/gpu.json` on one {card}, "
            "random weights of the shapes of LLaMA-2-7B and SmolLM2-135M:"
        )
    lines += ["", "| figure | bar | measured | met |", "|---|---:|---:|---|"]
    for path, words, bar in ROWS:
        value = None if card is None else figure(found, path)
        shown = "not measured" if value is None else f"{value:.3g}"
        limit = "" if bar is None else f"<= {bar:g}"
        met = "" if value is None or bar is None else ("yes" if value <= bar else "no")
        lines.append(f"| {words} | {limit} | {shown} | {met} |")
    return [*lines, "", *REMARKS] if card else lines


def operations(found: dict[str, Any] | None) -> list[str]:
    """What is counted without a GPU."""
    if found is None:
        return ["Operations of one block: not counted."]
    lines = [
        "`python benchmarks/operations.py --json benchmarks/results/operations.json`: operations "
        "of one Llama block, forward and backward, counted on a CPU with products made as a GPU "
        "has them. Mixed ranks are of five sizes.",
        "",
        "| | PEFT | ours | ours, mixed ranks | ours over PEFT |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, of in found["operations"].items():
        ratio = of["ours"] / of["peft"]
        lines.append(f"| {kind} | {of['peft']} | {of['ours']} | {of['mixed']} | {ratio:.2f} |")
    return lines


def figure(found: dict[str, Any], path: str) -> float | None:
    """A number of the JSON, or one made of two stages; None where a stage did not give it."""
    made = {
        "liger_over_floor": ("seconds", "ours", "floor"),
        "liger_memory_over_peft": ("bytes", "ours", "hf"),
    }
    if path in made:
        of, above, below = made[path]
        parts = [
            middle(found, f"{stage}.{of}.{name}")
            for stage, name in (("liger", above), ("long", below))
        ]
        return parts[0] / parts[1] if all(parts) else None
    return middle(found, path)


def middle(found: Any, path: str) -> float | None:
    """What lies at a path, the median of a list."""
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, list):
        return float(sorted(found)[len(found) // 2])
    return None if found is None else float(found)
