"""The ten tasks on real rows, against the tables of the README beside them.

Runs only where LORALLOC_DATA names a folder with a subfolder a task: real rows are not ours to
keep in the repository.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from loralloc.tasks.catalog import TASKS, load_task
from loralloc.tasks.columns import to_examples

FOLDERS = {"e2e": "e2e_nlg", "alpaca": "alpaca_cleaned"}
"""Subfolders that are not called as their task."""

pytestmark = pytest.mark.skipif(
    "LORALLOC_DATA" not in os.environ,
    reason="needs real rows: set LORALLOC_DATA to a folder with one subfolder a task",
)


def documented(name):
    """What the README says: rows and label counts of every split of one set."""
    readme = (Path(os.environ["LORALLOC_DATA"]) / "README.md").read_text(encoding="utf-8")
    sections = [part for part in readme.split("\n## ") if f"`{name}/`" in part.partition("\n")[0]]
    assert len(sections) == 1, f"the README has {len(sections)} sections on {name}"
    line = re.compile(r"^\| (train|validation|test)\.jsonl \| (\d+) \|([^|]*)\|", re.MULTILINE)
    found = {
        split: (int(rows), {int(k): int(v) for k, v in re.findall(r"(\d+): (\d+)", labels)})
        for split, rows, labels in line.findall(sections[0])
    }
    assert found
    return found


@pytest.mark.parametrize("name", [name for name in TASKS if name != "demo"])
def test_counts_and_labels_are_those_of_the_readme(name):
    task, folder = TASKS[name], FOLDERS.get(name, name)
    splits = load_task(task, Path(os.environ["LORALLOC_DATA"]) / folder)
    wanted = documented(folder)
    assert set(splits) == set(wanted)
    for split, (rows, labels) in wanted.items():
        examples = to_examples(splits[split], task)
        assert len(examples) == rows
        counted = Counter(example.label for example in examples if example.label is not None)
        assert counted == labels
        assert bool(labels) == bool(task.labels)


@pytest.mark.parametrize("name", ["squad", "record"])
def test_every_answer_is_where_the_span_says(name):
    splits = load_task(TASKS[name], Path(os.environ["LORALLOC_DATA"]) / name)
    for split in splits.values():
        for example in to_examples(split, TASKS[name]):
            span = example.span
            assert span.answers[0].split() == example.response.split()
            for answer, start in zip(span.answers, span.starts, strict=True):
                assert span.context[start : start + len(answer)] == answer
