"""The README of a run folder: what was trained, where the ranks went, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralloc.allocation.record import Record

CLASSES = {
    "lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "span": "AutoModelForQuestionAnswering",
}


def write(
    folder: Path,
    *,
    base_model: str,
    data: str,
    head: str,
    num_labels: int,
    record: Record,
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Write `README.md` into a run folder."""
    start, now = record.initial_ranks, record.ranks
    gained = {name: now[name] - start[name] for name in now if now[name] > start[name]}
    most = sorted(gained, key=lambda name: -gained[name])[:5]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    labels = f", num_labels={num_labels}" if num_labels else ""
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, peft, loralloc, rank-allocation]",
        "---",
        "",
        f"# LoRA adapter for {base_model}, ranks allocated while training",
        "",
        f"Trained on {data} with loralloc (ALoRA, Liu et al. 2024). This is an ordinary PEFT LoRA "
        "adapter with unequal ranks; loading it needs PEFT alone:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {CLASSES[head]}",
        "",
        f'base = {CLASSES[head]}.from_pretrained("{base_model}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{folder.name}")',
        "```",
        "",
        f"- Ranks: {sum(start.values())} at the start, {sum(now.values())} now, in "
        f"{sum(rank > 0 for rank in now.values())} of {len(now)} modules.",
        f"- Rounds: {len(record.rounds)}, scored by `{record.config['score']}`.",
    ]
    if most:
        moved = ", ".join(f"`{name}` (+{gained[name]})" for name in most)
        lines.append(f"- Gained most: {moved}.")
    lines += [
        f"- Development loss at step {entry['step']}: {entry['eval_loss']:.4f}"
        for entry in evaluations
    ]
    lines += [
        "",
        "`allocation.json` holds every round, `metrics.jsonl` every log entry, `settings.json` "
        "every setting with its source.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
