"""docs/reliability.md, from what experiments wrote."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "reliability.json"
FUZZ = RESULTS.with_name("fuzz.json")
SCALE = RESULTS.with_name("scale.json")
PROMISED = RESULTS.with_name("reliability_tests.json")
PAGE = ROOT / "docs" / "reliability.md"

READERS = {
    "allocation.json": "the record of rounds",
    "adapter_config.json": "PEFT's description of an adapter",
    "settings": "settings, claim and seal of a run folder",
    "task-rows": "rows of every task, and conversations",
}
"""What the targets of fuzzing read."""

TESTS = {
    (
        "From a checkpoint before, between, after or in the step of a round a run goes on bit "
        "for bit, whatever the method; a torn or changed checkpoint is not gone on from."
    ): (
        "training/test_drive.py",
        "training/test_checkpoint.py",
        "training/test_seal.py",
        "training/test_best_checkpoint.py",
        "training/test_epoch_of_a_resumed_run.py",
        "runs/test_resume.py",
    ),
    (
        "Several processes, also with a sharded backbone, have one plan and the same weights, "
        "go on in another number, and learn what one process learns."
    ): (
        "processes",
        "allocation/test_replicas.py",
    ),
    ("On a quantised base ranks train, are scored and moved, are saved and gone on from."): (
        "training/test_attach_quantised.py",
        "runs/test_exporting_quantised.py",
        "cli/test_train_quantised.py",
    ),
    (
        "A value that is not finite ends a run in a sentence; half precision, skipped steps "
        "and accumulation move no round."
    ): (
        "training/test_finite.py",
        "training/test_attach_numbers.py",
        "training/test_mixed_precision.py",
    ),
    (
        "Files, folders and servers of strangers run no code, take no memory that they do not "
        "hold, write nothing elsewhere, and are refused in a sentence."
    ): (
        "hostile",
        "adapters/test_stranger.py",
        "runs/test_permissions.py",
        "evaluation/judge/test_judge_hostile.py",
    ),
    (
        "A run deletes nothing that is not its own, is alone in its folder, and what a round "
        "costs does not grow with those before it."
    ): (
        "runs/test_ownership.py",
        "runs/test_run_folder.py",
        "cli/test_machine_faults.py",
        "allocation/test_many_rounds.py",
        "allocation/test_whole_files.py",
    ),
}
"""What is promised beside, and the tests that hold it."""

MIB = 2**20

WIDTH = 92
"""Characters of a line."""


def page() -> str:
    """The page, from the files of results that are there."""
    parts = [_trials(_read(RESULTS))]
    for path, part in ((FUZZ, _fuzzed), (SCALE, _scaled)):
        if path.is_file():
            parts.append(part(_read(path)))
    return "\n".join([*parts, _tests(_read(PROMISED) if PROMISED.is_file() else None)])


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def _trials(data: dict[str, Any]) -> str:
    lines = [
        "# What is promised of runs that die",
        "",
        "Written from the JSON in `experiments/results/`, not by hand.",
        "",
        "`python experiments/reliability.py` (with `--only` it tries some promises anew, so they",
        f"differ in how often they were tried) on a machine of {data['machine']}: every trial is",
        "a whole run of `loralloc train` (a Llama of two blocks, 18 steps, three rounds, noise in",
        "the embeddings) in a process of its own. Its end counts as the same where the adapter is",
        "equal bit for bit, and all rounds and logged losses are.",
        "",
        "| promise | how it is tried | tried | failed |",
        "|---|---|---:|---:|",
    ]
    for entry in data["promises"]:
        failed = len(entry["failed"])
        lines.append(f"| {entry['promise']} | {entry['how']} | {entry['tried']} | {failed} |")
    failures = [f"- {e['name']}, {fault}" for e in data["promises"] for fault in e["failed"]]
    lines += ["", *(["What failed:", "", *failures] if failures else ["Nothing failed."]), ""]
    return "\n".join(lines)


def _fuzzed(data: dict[str, Any]) -> str:
    lines = [
        "## Files from strangers",
        "",
        "Whatever such a file holds, reading it ends in a sentence or in what it says: no other",
        "exception, nothing that takes over 5 seconds or 2 GiB, nothing written outside of the",
        "folder, no connection. `python experiments/fuzz.py` (atheris, on one core; what several",
        "runs tried adds up) tries files that are whole but for up to six changes:",
        "",
        "| read | inputs | a second | faults |",
        "|---|---:|---:|---:|",
    ]
    for name, found in data["targets"].items():
        tried, faults = found["inputs_all"], len(found["faults"])
        speed = tried / max(1, found["seconds_all"])
        lines.append(f"| {READERS[name]} | {tried:,} | {speed:,.0f} | {faults} |")
    lines += [
        "",
        "What was found before is in `tests/hostile/found` and the tests of the readers.",
        "PEFT reads a configuration only after it was checked: sizes, shapes against the backbone,",
        "and regular expressions tried in a process that is ended after ten seconds.",
        "",
    ]
    return "\n".join(lines)


def _scaled(data: dict[str, Any]) -> str:
    rounds, wide = data["rounds"], data["wide"]
    first, last = (rounds["resident_bytes"][n] / MIB for n in ("10", str(rounds["rounds"])))
    lines = [
        "## Many modules, ranks and rounds",
        "",
        f"`{data['command']}` on {data['machine']}, one thread (rounds by `gradient`):",
        "",
        "| modules | ranks | a round | memory of five rounds | an entry of the record |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {of['modules']:,} | {of['ranks']:,} | {of['round_s']:.3f} s | "
        f"{of['more_bytes'] / MIB:.0f} MiB | {of['entry_bytes'] / 1024:.0f} KiB |"
        for of in (wide, *data["modules"])
    ]
    lines += [
        "",
        textwrap.fill(
            f"{rounds['rounds']:,} rounds of {rounds['modules']} modules, of which "
            f"{rounds['emptied']} have no rank left at the end: {first:.0f} MiB are resident after "
            f"round 10 and {last:.0f} MiB after the last ({rounds['growth']:+.2%}); a round takes "
            f"{1000 * rounds['early_s']:.1f} ms at the beginning and "
            f"{1000 * rounds['late_s']:.1f} ms at the end, and its entry "
            f"{rounds['early_bytes'] / 1024:.1f} and {rounds['late_bytes'] / 1024:.1f} KiB.",
            WIDTH,
        ),
        "",
        textwrap.fill(_saved(rounds["rounds"], rounds["saved"]), WIDTH),
        "",
    ]
    return "\n".join(lines)


def _saved(count: int, saved: dict[str, Any]) -> str:
    return (
        "A round rewrites nothing: it adds an entry in memory and a line to `metrics.jsonl`. The "
        "record goes into `allocation.json` with a checkpoint and at the end, and whole, since a "
        "checkpoint is sealed, copied and gone on from by itself. Where every one of these "
        f"{count:,} rounds has a checkpoint, that is {saved['last_bytes'] / MIB:.1f} MiB in "
        f"{1000 * saved['last_s']:.0f} ms for the last one, {1000 * saved['a_round_s']:.0f} ms for "
        f"one of them all, and {saved['all_bytes'] / MIB:,.0f} MiB written in the whole run, of "
        "which `save_total_limit` says how much stays. A round adds "
        f"{saved['a_rank_bytes']:.0f} bytes a rank to what a checkpoint holds, and the rank itself "
        "with AdamW's moments 12 bytes for every row and column of its module: 98,304 at a width "
        "of 4,096."
    )


def _tests(found: dict[str, Any] | None) -> str:
    lines = [
        "## What tests hold",
        "",
        "These are in `tests/`; `make test` runs most of them, `make reliability` all:",
        "",
        "| promise | tests | tried | failed |",
        "|---|---|---:|---:|",
    ]
    for promise, tests in TESTS.items():
        names = ", ".join(f"`{name}`" for name in tests)
        lines.append(f"| {promise} | {names} | {' | '.join(_tried(tests, found))} |")
    if found:
        others = found["others"]
        lines += [
            "",
            textwrap.fill(
                f"`python experiments/reliability_tests.py` ran them on {found['machine']}, and "
                f"{others['tried']:,} others that take long, of which {len(others['failed'])} "
                "failed.",
                WIDTH,
            ),
        ]
    return "\n".join([*lines, ""])


def _tried(tests: Sequence[str], found: dict[str, Any] | None) -> tuple[str, str]:
    """How many cases of some files were tried, and how many failed."""
    if not found:
        return "-", "-"
    of = [
        counts
        for name, counts in found["promised"].items()
        if any(name == test or name.startswith(f"{test}/") for test in tests)
    ]
    return f"{sum(c['tried'] for c in of):,}", f"{sum(len(c['failed']) for c in of)}"


if __name__ == "__main__":
    PAGE.write_text(page())
