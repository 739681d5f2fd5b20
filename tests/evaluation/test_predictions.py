"""Predictions on disk: what an earlier call left, and what is no such thing."""

import json

import pytest

from loralloc.evaluation.predictions import Predictions

SETTINGS = {"task": "sst2"}


def predictions(folder, **options):
    return Predictions(
        folder,
        **options,
        settings=SETTINGS,
        prompts=["one", "two"],
        gold=["a", "b"],
        score=lambda index, text: 1.0,
    )


def test_a_last_line_that_was_cut_within_a_letter_is_dropped(tmp_path):
    predictions(tmp_path).add([0, 1], ["déjà", "ein Läufer"], set())
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("ä".encode()) + 1])
    found = predictions(tmp_path)
    assert found.done == {0}
    found.add([1], ["b"], set())
    assert found.texts == ["déjà", "b"]


def test_what_is_replaced_stays_until_there_is_a_first_prediction(tmp_path):
    predictions(tmp_path).add([0, 1], ["a", "b"], set())
    before = (tmp_path / "predictions.jsonl").read_text()
    found = predictions(tmp_path, replaces=True)
    assert found.done == set() and (tmp_path / "predictions.jsonl").read_text() == before
    found.add([0], ["c"], set())
    found.add([1], ["d"], set())
    assert predictions(tmp_path).texts == ["c", "d"]


def test_an_evaluation_without_a_task_is_no_beginning_of_one(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"loss": 0.5}))
    with pytest.raises(ValueError, match="holds the evaluation of a run without a task; replace"):
        predictions(tmp_path)
