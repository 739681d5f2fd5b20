"""`loralloc tasks`: one place that says what there is."""

import json

from loralloc.tasks.catalog import TASKS


def test_every_task_is_listed_with_sizes_metrics_and_licence(call):
    shown = call("tasks")
    assert shown.code == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in shown.out.splitlines() if line}
    assert set(TASKS) <= set(rows)
    assert rows["sst2"] == "sst2 nyu-mll/glue, sst2 66,349 1,000 872 lm, classification"
    assert rows["squad"] == "squad rajpurkar/squad 86,599 1,000 10,570 lm, span"
    assert rows["mt_bench"] == "mt_bench - - - 80 lm"
    assert "bleu, rouge-l, meteor" in shown.out
    assert "CC BY-NC 4.0" in shown.out
    assert "\x1b" not in shown.out


def test_it_fits_a_terminal_of_80_columns(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("tasks").out.splitlines()
    assert max(map(len, lines)) <= 80
    for task in TASKS.values():  # nothing is broken over lines
        assert any(line.startswith(task.name) and "lm" in line for line in lines)
        assert any(task.licence in line for line in lines)


def test_json(call):
    rows = {row["task"]: row for row in json.loads(call("tasks", "--json").out)}
    assert list(rows) == list(TASKS)
    assert rows["record"] == {
        "task": "record",
        "data_set": "aps/super_glue, record",
        "sizes": {"train": 99_730, "validation": 1000, "test": 10_000},
        "heads": ["lm", "span"],
        "metrics": ["f1-em"],
        "licence": "Apache-2.0 in part",
    }
    assert rows["alpaca"]["sizes"] == {"train": 51_760}
    assert rows["demo"]["data_set"] is None
