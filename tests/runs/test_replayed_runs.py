"""Runs whose steps are replayed end as the same runs whose steps are run."""

import json

import pytest
import torch
from crossed import crossed
from safetensors.torch import load_file
from taped import Tape

from loralloc.runs import run as runs
from loralloc.training import graphs

COMMON = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dtype": "float32",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
}
ROUNDS = {"rounds_at": [3, 6], "scoring_examples": 4}
METHODS = {
    "lora": {"method": "lora", "lora_r": 2},
    "alora": {"method": "alora", "lora_r": 2, **ROUNDS},
    "alora-sensi": {"method": "alora-sensi", "lora_r": 2, "rounds_at": [3, 6]},
}


@pytest.fixture
def data(tmp_path, write_rows):
    rows = [
        {
            "prompt": f"the film {number} is" + " very" * (number % 5),
            "completion": f" {'good' if number % 2 else 'bad and cold'}",
            "text": f"the film is {'good' if number % 2 else 'bad'}" + " and warm" * (number % 4),
            "label": number % 2,
        }
        for number in range(30)
    ]
    columns = {"lm": ("prompt", "completion"), "classification": ("text", "label")}
    for head, names in columns.items():
        for split, part in (("train", rows[:22]), ("validation", rows[22:])):
            chosen = [{name: row[name] for name in names} for row in part]
            write_rows(tmp_path / head / f"{split}.jsonl", chosen)
    return tmp_path


@pytest.fixture
def on_tape(monkeypatch):
    """Recordings for this machine; how often one was replayed."""
    replayed = []

    class Counted(Tape):
        def replay(self):
            replayed.append(self)
            super().replay()

    monkeypatch.setattr(graphs, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: Counted)
    return replayed


def trained(**options):
    run = runs.prepare({**COMMON, **options})
    runs.train(run)
    return run


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry[name] for entry in entries for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize(("method", "head"), crossed(list(METHODS), ["lm", "classification"]))
def test_a_run_ends_as_the_one_without(
    method, head, data, tmp_path, llama_folder, bert_folder, on_tape
):
    folder = {"lm": llama_folder, "classification": bert_folder}[head]
    common = {
        **METHODS[method],
        "dataset_name": data / head,
        "model_name_or_path": folder,
        **({"model_init_kwargs": NO_DROPOUT} if head == "classification" else {}),
    }
    alone = trained(**common, output_dir=tmp_path / "alone")
    assert not on_tape
    replayed = trained(**common, output_dir=tmp_path / "graphs", cuda_graphs=True)
    assert len(on_tape) > 6  # forward and backward of more than three batches
    if replayed.allocation:
        rounds = [run.allocation.record.rounds for run in (alone, replayed)]
        assert len(rounds[0]) == 2
        assert [r.added for r in rounds[0]] == [r.added for r in rounds[1]]
    assert losses(tmp_path / "graphs") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    weights = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("graphs", "alone")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"packing": True}, "packing"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"method": "sora"}, "method"),
        ({"method": "alora", "allocation.score": "gradient", **ROUNDS}, None),
    ],
)
def test_what_a_recording_would_leave_out_is_refused(
    options, why, data, tmp_path, llama_folder, on_tape
):
    given = {
        **COMMON,
        **METHODS["lora"],
        "dataset_name": data / "lm",
        "model_name_or_path": llama_folder,
        "output_dir": tmp_path / "run",
        "cuda_graphs": True,
        **options,
    }
    if why is None:
        runs.prepare(given)
        return
    with pytest.raises(ValueError, match=why):
        runs.prepare(given)


def test_it_needs_a_gpu(data, tmp_path, llama_folder):
    with pytest.raises(ValueError, match="computes on 'cpu'"):
        trained(
            **METHODS["lora"],
            dataset_name=data / "lm",
            model_name_or_path=llama_folder,
            output_dir=tmp_path / "run",
            cuda_graphs=True,
        )


def test_a_batch_is_made_longer_and_no_loss_is_taken_there():
    ids = torch.ones(2, 5, dtype=torch.long)
    full = graphs.padded({"input_ids": ids, "labels": ids, "kept": torch.ones(2)}, padding=7)
    assert full["input_ids"].shape == (2, 16) and full["input_ids"][0, 5:].tolist() == [7] * 11
    assert full["labels"][0, 4:].tolist() == [1] + [-100] * 11
    assert full["attention_mask"].sum().item() == 10
    assert full["kept"].shape == (2,)
    same = {"input_ids": torch.ones(2, 32, dtype=torch.long)}
    assert graphs.padded(same, padding=7) == same
