"""Rows are tokenised once where runs share them, and anew elsewhere."""

from datasets import Dataset

from loralloc.runs.fleet import FleetRuns
from loralloc.runs.prepared_rows import once, shared_rows

ONE, SAME, OTHER = (Dataset.from_list([{"text": text}]) for text in ("good", "good", "bad"))


def test_the_same_rows_are_prepared_once_where_they_are_shared():
    with shared_rows({}):
        first, again, other = (once(rows, lambda: object()) for rows in (ONE, SAME, OTHER))
        assert first is again is not other
        assert once([1], lambda: "a list is prepared") == once([1], lambda: "a list is prepared")
    assert once(ONE, lambda: "anew") == "anew"


def test_runs_of_a_fleet_have_the_same_rows(tmp_path, write_rows, llama_folder):
    rows = [{"prompt": f"the film {n} is", "completion": " good"} for n in range(6)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    options = {
        "dataset_name": str(tmp_path / "data"),
        "model_name_or_path": str(llama_folder),
        "max_steps": 2,
        "use_cpu": True,
        "dtype": "float32",
    }
    fleet = FleetRuns()
    one, two = (
        fleet.add({**options, "seed": n, "output_dir": str(tmp_path / f"{n}")}).trainer
        for n in (0, 1)
    )
    assert one.train_dataset is two.train_dataset
    assert one.train_dataset.to_dict()["labels"]
