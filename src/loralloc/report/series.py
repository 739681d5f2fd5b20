"""Runs that differ in nothing but their seed are one series: one colour, one row, one mean."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from loralloc.methods.catalog import built_in_method
from loralloc.methods.method import Method
from loralloc.report.folders import TrainedRun, shown

SEEDS = ("seed", "data_seed", "allocation.seed")
OF_NO_EFFECT = frozenset({"output_dir", "report_to", *SEEDS})
"""Settings that make no other experiment."""

SHORT = {
    **{"model_name_or_path": "model", "dataset_name": "data", "learning_rate": "lr"},
    **{"lora_r": "r", "method.rank": "r", "per_device_train_batch_size": "batch"},
}
BARE = ("method", "model_name_or_path", "task")
"""Settings whose value says by itself what it is of."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Runs with one setting, and what tells it from the others."""

    index: int
    """Its place, by which it has its colour in every figure."""

    label: str
    runs: Sequence[TrainedRun]


def series_of(runs: Sequence[TrainedRun]) -> list[Series]:
    """The runs by what they were given, in their order."""
    groups: dict[tuple[Any, ...], list[TrainedRun]] = {}
    options = sorted({name for run in runs for name in run.settings} - OF_NO_EFFECT)
    met: Counter[tuple[Any, ...]] = Counter()
    for run in runs:
        key = tuple(repr(run.settings.get(name)) for name in options)
        drawn = (*key, *(repr(run.settings.get(name)) for name in SEEDS))
        met[drawn] += 1
        # A copy of a run, whole or resized, is no further seed of it.
        group = (*key, met[drawn]) if run.settings else (run.name,)
        groups.setdefault(group, []).append(run)
    firsts = [group[0] for group in groups.values()]
    labels = _labels(firsts, options)
    if all(len(group) == 1 for group in groups.values()):
        labels = [run.name for run in firsts]
    told = Counter(labels)
    labels = [
        run.name if told[label] > 1 else label for run, label in zip(firsts, labels, strict=True)
    ]
    return [
        Series(index=index, label=label, runs=group)
        for index, (label, group) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def method_of(run: TrainedRun) -> str:
    """How it was adapted."""
    return shown(run.setting("method") or "adapter")


def model_of(run: TrainedRun) -> str:
    """What was adapted, without the folders above it."""
    return shown(PurePath(str(run.setting("model_name_or_path") or "")).name)


def data_of(run: TrainedRun) -> str:
    """What it was trained on."""
    return shown(run.setting("task") or PurePath(str(run.setting("dataset_name") or "")).name)


def size_of(run: TrainedRun) -> str:
    """The rank or another size that it was given; empty where a budget chose it."""
    size = _size_option(run)
    given = run.setting(f"method.{size}", *(["lora_r"] if size == "rank" else []))
    return "" if given is None else shown(given)


def spread(values: Sequence[float], form: str) -> str:
    """One value, or the mean of several with their standard deviation."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def ends_later(run: TrainedRun) -> bool:
    """Whether it had more parameters for a part of the run than its method ends with."""
    try:
        kind = built_in_method(method_of(run))
    except ValueError:
        return False
    return kind.first_eligible_step is not Method.first_eligible_step


def _size_option(run: TrainedRun) -> str:
    """The name of its method's size; empty of a method that is not ours, which is not imported."""
    try:
        return built_in_method(method_of(run)).size
    except ValueError:
        return ""


def _labels(runs: Sequence[TrainedRun], options: Sequence[str]) -> list[str]:
    """For each run the settings that tell it from the others, as few as do, its method first.

    A setting that only methods or sizes have given does not tell apart what these have told.
    """
    preferred = [name for name in (*BARE, *SHORT) if name in options]
    labels = [""] * len(runs)
    for name in dict.fromkeys((*preferred, *options)):
        more = [
            ", ".join(filter(None, (label, _told(run, name))))
            for run, label in zip(runs, labels, strict=True)
        ]
        if len(set(more)) > len(set(labels)):
            labels = more
    return labels


def _told(run: TrainedRun, name: str) -> str:
    value = run.settings.get(name)
    unread = name == "lora_r" and (_size_option(run) != "rank" or "method.rank" in run.settings)
    if value is None or unread:
        return ""
    value = PurePath(value).name if isinstance(value, str) else value
    return shown(value if name in BARE else f"{SHORT.get(name, name.rpartition('.')[2])}={value}")
