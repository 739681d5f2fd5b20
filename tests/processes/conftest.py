"""Folders in which processes find a model and data."""

import json

import pytest


@pytest.fixture(scope="session")
def write_examples():
    """Writes 32 examples to train on and 16 to evaluate on, of unequal length."""
    ends = (" good", " bad and cold", " warm")

    def write(folder):
        folder.mkdir()
        for name, count in (("train", 32), ("validation", 16)):
            rows = [
                {"prompt": f"the film {n} is" + " and" * (n % 5), "completion": ends[n % 3]}
                for n in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)

    return write
