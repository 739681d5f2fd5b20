"""Writes docs/performance.md from the JSON of the benchmarks.

Run: make bench (or, after the benchmarks, python benchmarks/page.py)
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import gpu_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

RUNGS = {
    "hf": "PEFT under `Trainer`: logits of every position",
    "peft": "logits at supervised positions only",
    "head": "head and cross-entropy as one function, a few rows at a time",
    "lora": "each LoRA linear as one function, in the activation's dtype",
    "shared": "q, k, v and gate, up share their product with A",
    "product": "float32 products by oneDNN, where MKL is slow",
    "ours": "attention over short sequences as batched products",
}

BARS = (
    ("scoring", "speedup_gradient", "`gradient` against paper-literal, times faster", ">= 500"),
    ("scoring", "speedup_screened", "`screened` against paper-literal, times faster", ">= 50"),
    ("scoring", "speedup_prefix", "prefix-shared against paper-literal, times faster", ">= 2.2"),
    ("scoring", "cost_ratio_r32_over_r8", "cost of `gradient`, r 32 over r 8", "<= 1.3"),
    ("step", "bfloat16.ours_over_floor", "our step over the frozen model, bfloat16", "<= 1.10"),
    ("step", "float32.ours_over_floor", "our step over the frozen model, float32", "<= 1.05"),
    ("step", "bfloat16.hf_over_ours", "PEFT and Trainer's loss over our step, bfloat16", ">= 1.7"),
    ("end_to_end", "alora_over_lora_time", "ALoRA over LoRA, whole run", "<= 1.03"),
    (
        "end_to_end",
        "alora_over_lora_time_at_paper_proportions",
        "the same, composed at the paper's E2E proportions",
        "<= 1.03",
    ),
    (
        "end_to_end",
        "round_over_training_examples",
        "a round over training on as many examples",
        "<= 2.2",
    ),
    (
        "end_to_end",
        "alora_over_lora_peak_memory",
        "peak resident memory, ALoRA over LoRA, whole run",
        "<= 1.01",
    ),
    ("memory", "alora_over_lora_peak_memory", "the same, memory held in a short run", "<= 1.01"),
)


VERSIONS = ("python", "torch", "transformers", "peft", "trl")


def main() -> None:
    """Read what is there, write the page."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
        if path.stem in (*SECTIONS, "gpu", "operations")
    }
    PAGE.write_text("\n".join(page(results)) + "\n", encoding="utf-8")


def page(results: dict[str, dict[str, Any]]) -> list[str]:
    """docs/performance.md, line by line."""
    machine = next(results[name] for name in SECTIONS if name in results)["machine"]
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/page.py` from the JSON files in `benchmarks/results/`, that",
        "hold every repeat. Each table is one run of the command above it on one machine, the",
        "contestants by turns; only ratios mean anything elsewhere. `make bench` runs most of the",
        "commands anew, quickly, and replaces what is there.",
        "",
        f"Versions: {', '.join(f'{name} {machine[name]}' for name in VERSIONS)}.",
        "",
        "## Against the bars",
        "",
        "The worst task or model counts where there are several.",
        "",
        "| figure | bar | measured | met | settings |",
        "|---|---:|---:|---|---|",
    ]
    for name, key, words, bar in BARS:
        if name in results:
            value = results[name]
            for part in key.split("."):
                value = value[part]
            met = "yes" if is_met(value, bar) else "no"
            how = settings(results[name])
            lines.append(f"| {words} | {bar} | {value:.4g} | {met} | {how} |")
            lines += by_model(key, results[name], bar)
    for name, section in SECTIONS.items():
        if name in results:
            lines += ["", *section(results[name])]
    return [*lines, "", *gpu_page.section(results)]


def by_model(key: str, result: dict[str, Any], bar: str) -> list[str]:
    """Rows of single models below that of the worst whole run."""
    figures = {"alora_over_lora_time": "seconds", "alora_over_lora_peak_memory": "peak_bytes"}
    if key not in figures:
        return []
    of, rows = figures[key], []
    for model, taken in result.get("runs", {}).items():
        value = taken["alora"][of] / taken["lora"][of]
        met = "yes" if is_met(value, bar) else "no"
        steps = f"{taken['lora']['steps']:,} steps"
        rows.append(f"| - {model}, {steps} | {bar} | {value:.4f} | {met} | full |")
    return rows


def is_met(value: float, bar: str) -> bool:
    """Whether a value keeps a bar such as ">= 50"."""
    sign, limit = bar.split()
    return value >= float(limit) if sign == ">=" else value <= float(limit)


def settings(result: dict[str, Any]) -> str:
    """How a benchmark was run."""
    return "`--quick`" if result["quick"] else "full"


def command(name: str, result: dict[str, Any]) -> str:
    """The command that wrote a JSON file, and on what."""
    quick = " --quick" if result["quick"] else ""
    machine = result["machine"]
    told = ["-".join(machine["platform"].split("-")[:4]), f"threads {machine['threads']}"]
    told += [f"load {machine['load']}"] if "load" in machine else []
    run = f"`python benchmarks/{name}.py{quick} --json benchmarks/results/{name}.json`"
    return f"{run} ({', '.join(told)}):"


def ladder(result: dict[str, Any]) -> list[str]:
    """One optimisation a row."""
    lines = ["## The training step", "", command("step", result), "smollm2-135m.", ""]
    cases = [
        (dtype, task, found)
        for dtype in ("bfloat16", "float32")
        for task, found in result[dtype].items()
        if isinstance(found, dict)
    ]
    lines.append(
        "Seconds over those of the frozen model (forward, and backward to its input); each row "
        "keeps what the rows above it brought."
    )
    heads = [f"{task} {dtype} {found['shape']}" for dtype, task, found in cases]
    lines += ["", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(cases)]
    names = {**RUNGS, "trl": "for comparison: PEFT under TRL's SFTTrainer"}
    names["floor*"] = "for comparison: the frozen model with our attention"
    for rung, words in names.items():
        row = [ratio(f["seconds"][rung], f["seconds"]["floor"]) for _, _, f in cases]
        lines.append(f"| {words} | {' | '.join(f'{x:.2f}' for x in row)} |")
    saved = {task: f["padded_tokens_random_over_buckets"] for _, task, f in cases}
    words = ", ".join(f"{task} {value:.2f}" for task, value in saved.items())
    lines += [
        "",
        f"Batches of like length (the default) hold fewer tokens with their padding; tokens of an "
        f"epoch at random over those in buckets: {words}.",
    ]
    return lines


def after_rounds(result: dict[str, Any]) -> list[str]:
    """What ranks of many sizes cost a step."""
    return [
        command("after_rounds", result),
        "after rounds every module has a rank of its own, and oneDNN compiles a product for every "
        "shape. On batches each of a length not seen before, a step of smollm2-135m in bfloat16 "
        f"takes {result['mixed_over_uniform']:.2f} times as long a token as with rank 8 "
        f"everywhere; {result['unrounded_over_uniform']:.2f} times where the ranks are not "
        "rounded up to a multiple of 8 inside the products. A length leaves "
        + ", ".join(f"{b / 1e6:.0f} MB ({n})" for n, b in result["kept_bytes_a_length"].items())
        + " of compiled products behind, until oneDNN's cache is full.",
    ]


def methods(result: dict[str, Any]) -> list[str]:
    """What ranks with gates or singular values cost a step."""
    lines = [
        "## Methods that put something on their ranks",
        "",
        command("methods", result),
        "gates and AdaLoRA's singular values go into A or B for the step, so that layers with them "
        "are the one function that LoRA's are. Forward, loss and backward of smollm2-135m on "
        f"{result['task']}, batch {result['shape']}, bfloat16, as the run begins (AdaLoRA, SoRA "
        "and SaLoRA with more ranks than they end with), over LoRA's with our layers. AdaLoRA's "
        "regularisation, the optimiser and schedules come on top. The machine's load was "
        f"{result['machine']['load']} on {result['machine']['cores']} cores: differences of a "
        "tenth are noise.",
        "",
        "| method | parameters at first | PEFT's layers | ours |",
        "|---|---:|---:|---:|",
    ]
    for name, over in result["over_lora"].items():
        number = f"{result['parameters'][name]:,}"
        lines.append(f"| {name} | {number} | {over['peft']:.2f} | {over['ours']:.2f} |")
    return lines


def scoring(result: dict[str, Any]) -> list[str]:
    """Speed and agreement of the scores."""
    tasks = result["tasks"]
    first = next(iter(tasks.values()))
    lines = [
        "## Scoring a round",
        "",
        command("scoring", result),
        f"{first['ranks']} ranks, {first['scoring_examples']} examples, float32, after "
        f"{first['training_steps']} steps of training. Literal is timed on "
        f"{first['literal_timed_on']} ranks and prefix-shared on {first['prefix_timed_on']}, and "
        "scaled to all.",
        "",
        "| | " + " | ".join(f"{task}, s | times faster" for task in tasks) + " |",
        "|---|" + "---:|---:|" * len(tasks),
    ]
    for name in first["seconds"]:
        cells = []
        for found in tasks.values():
            taken = found["seconds"][name]
            cells.append(f"{taken:.4g} | {found['seconds']['literal'] / taken:.4g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| agreement | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    agreement = {
        "spearman": "Spearman of `gradient` with exact scores, sampled ranks",
        "pruned_set_equal": "`screened` prunes the exact set",
        "exact_near_the_cut": "ranks near the cut scored exactly to tell",
        "verified": "ranks that `screened` verified",
        "largest_difference_prefix_literal": "largest difference of prefix-shared to literal",
        "largest_importance": "largest importance among those",
        "shapley_sum_over_improvement": "sum of `shapley` over S(M) - S(M_0)",
    }
    for key, words in agreement.items():
        cells = [shown(found[key]) for found in tasks.values()]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    for what, seconds in result["growth_s"].items():
        words = ", ".join(f"{size}: {statistics.median(s):.3g} s" for size, s in seconds.items())
        lines += ["", f"`gradient` by {what}: {words}."]
    return lines


def whole_runs(result: dict[str, Any]) -> list[str]:
    """A round, and whole runs."""
    found = result["round"]
    lines = [
        "## Whole runs",
        "",
        command("end_to_end", result),
        f"a round of smollm2-135m on {found['task']} in {found['dtype']} takes "
        f"{result['round_over_training_examples']:.2f} times as long as training on as many "
        "examples. At the paper's E2E proportions (42,061 examples, 10 epochs, batch 16, 8 rounds) "
        f"that makes a run {result['alora_over_lora_time_at_paper_proportions']:.4f} times as long "
        "as LoRA's, composed from the measured round and step. Rounds cost the same however long a "
        "run is: 8 of them are 3% of a run that trains on "
        f"{8 * 32 * result['round_over_training_examples'] / 0.03:,.0f} examples, counted once an "
        "epoch, where those are as long as the scoring batch's; and more of a shorter one.",
    ]
    for model, taken in result.get("runs", {}).items():
        lora, alora = taken["lora"], taken["alora"]
        lines += ["", f"{model}, {lora['steps']} steps:", ""]
        lines += ["| | s | over LoRA | peak GiB | over LoRA |", "|---|---:|---:|---:|---:|"]
        for name, run in taken.items():
            seconds, peak = run["seconds"], run["peak_bytes"]
            lines.append(
                f"| {name} | {seconds:.0f} | {seconds / lora['seconds']:.3f} | "
                f"{peak / 2**30:.2f} | {peak / lora['peak_bytes']:.3f} |"
            )
        rounds = sum(alora["round_seconds"])
        lines += [
            "",
            f"ALoRA's {len(alora['round_seconds'])} rounds take {rounds:.1f} s, "
            f"{rounds / lora['seconds']:.1%} of LoRA's run; without them its run takes "
            f"{(alora['seconds'] - rounds) / lora['seconds']:.3f} times as long.",
        ]
    return lines


def memory(result: dict[str, Any]) -> list[str]:
    """Peak resident memory, and the allocator's part in it."""
    peaks = result["peak_bytes"]
    lines = [
        "## Memory",
        "",
        command("memory", result),
        f"what smollm2-135m holds on {result['task']}: 4 steps and a round, the longest batch "
        "first, with large blocks mapped, so that what is freed is given back.",
        "",
        "| | peak GiB | over LoRA |",
        "|---|---:|---:|",
        *(
            f"| {name} | {peak / 2**30:.2f} | {peak / peaks['lora']:.3f} |"
            for name, peak in peaks.items()
        ),
    ]
    allocators = result.get("allocators", {})
    if allocators:
        lora = allocators["glibc"]["lora"]
        lines += [
            "",
            "Runs stand higher: the allocator keeps blocks of lengths gone by, and oneDNN up to "
            "1,024 compiled products (`ONEDNN_PRIMITIVE_CACHE_CAPACITY` sets how many). How much "
            f"depends on the allocator; {lora['steps']} steps with "
            f"{len(allocators['glibc']['alora']['round_seconds'])} rounds, all by turns:",
            "",
            "| | LoRA, s | ALoRA, s | LoRA, peak GiB | ALoRA, peak GiB | ALoRA over LoRA, GiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, runs in allocators.items():
            one, other = (runs[method]["peak_bytes"] for method in ("lora", "alora"))
            lines.append(
                f"| {name} | {runs['lora']['seconds']:.0f} | {runs['alora']['seconds']:.0f} | "
                f"{one / 2**30:.2f} | "
                f"{other / 2**30:.2f} | {other / one:.3f} |"
            )
    return lines


def shrunk(result: dict[str, Any]) -> list[str]:
    """What inference gains where modules were left without ranks."""
    rows, length = result["read"]
    run = " --run RUN" if "shrunk" in result["modules"] else ""
    over = result["over_frozen"]
    names = {
        "uniform": "rank 8 everywhere",
        "shrunk": "what `shrink` left of it on E2E",
        "tenth": "a rank on every tenth module",
    }
    lines = [
        "## Modules without a rank",
        "",
        command("shrunk", result).replace(".py", f".py{run}", 1),
        f"adapters of smollm2-135m in float32, not merged. It reads {rows} x {length} tokens, and "
        f"writes {result['written']} tokens one after the other; seconds over those of the model "
        "without an adapter.",
        "",
        "| adapter | modules | ranks | reading | writing |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in result["modules"]:
        if name in names:
            lines.append(
                f"| {names[name]} | {result['modules'][name]} | {result['ranks'][name]:,} | "
                f"{over['read'][name]:.2f} | {over['write'][name]:.2f} |"
            )
    return lines


def ratio(above: list[float], below: list[float]) -> float:
    """The median over the turns that both took."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def shown(value: Any) -> str:
    """A number to four digits, a truth as a word."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


SECTIONS = {
    "step": ladder,
    "after_rounds": after_rounds,
    "methods": methods,
    "scoring": scoring,
    "end_to_end": whole_runs,
    "memory": memory,
    "shrunk": shrunk,
}
"""Of the page, in order, by the benchmark whose JSON each is written from."""


if __name__ == "__main__":
    main()
