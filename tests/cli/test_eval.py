import json

import pytest

from loralloc.tasks.source import load_splits

SENTENCES = ("a warm film", "a cold film", "the story is good", "the place is bad")
ROWS = {"train": 24, "validation": 8, "test": 6}


@pytest.fixture
def task_data(tmp_path, write_rows):
    """A folder with the columns of SST-2."""
    for name, count in ROWS.items():
        rows = [
            {"sentence": f"{SENTENCES[number % 4]} {number}", "label": (number + 1) % 2}
            for number in range(count)
        ]
        write_rows(tmp_path / "sst2" / f"{name}.jsonl", rows)
    return tmp_path / "sst2"


@pytest.fixture
def finished(train, output, task_data):
    """A run on SST-2 that knows its task and data."""
    assert train(task="sst2", dataset_name=task_data, learning_rate=0.1).code == 0
    return output


def test_a_run_is_measured_on_its_own_task_and_data(finished, task_data, call):
    answer = call("eval", finished)
    assert (answer.code, answer.err) == (0, "")
    folder = finished / "eval" / "sst2-test-beam5"
    result = json.loads((folder / "eval.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    rows = load_splits(task_data)["test"].dataset
    assert [line["gold"] for line in lines] == [
        ("negative", "positive")[row["label"]] for row in rows
    ]
    assert "sst2, test: 6 examples, 5 beams" in answer.out
    assert f"results: {folder}" in answer.out
    table = [line.split("│") for line in answer.out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row[1:4]] for row in table] == [
        [figure["name"], f"{figure['value']:.2f}", figure["implementation"]]
        for figure in result["figures"]
    ]
    assert "6 predictions in " in answer.out


def test_label_scoring_is_reported_as_such(finished, call):
    answer = call("eval", finished, "--decode", "labels", "--limit", 4, "--split", "train")
    assert 'sst2, train: 4 of 24 examples, decode="labels" (not the paper\'s)' in answer.out
    result = json.loads((finished / "eval" / "sst2-train-labels" / "eval.json").read_text())
    assert result["settings"]["decode"] == "labels"


def test_the_same_command_again_predicts_nothing(finished, call, monkeypatch):
    words = ["eval", finished, "--decode", "labels", "--base"]
    first = call(*words).out
    assert "without the adapter" in first
    monkeypatch.delattr("loralloc.evaluation.predictors.load_trained")
    again = call(*words)
    assert again.code == 0
    assert "6 predictions are there already" in again.out
    assert [line for line in again.out.splitlines() if "│" in line] == [
        line for line in first.splitlines() if "│" in line
    ]


def test_what_is_missing_or_was_cut_is_told(finished, call, task_data, write_rows, monkeypatch):
    from loralloc.evaluation.figure import Figure

    none = Figure(name="METEOR", value=None, implementation="nltk", missing="Install [WordNet].")
    monkeypatch.setattr("loralloc.evaluation.evaluate.measure", lambda *_, **__: [none])
    write_rows(task_data / "test.jsonl", [{"sentence": "x" * 5000, "label": 0}])
    out = call("eval", finished, "--decode", "labels").out
    assert "METEOR: Install [WordNet]." in out and "missing" in out
    assert "1 prompts are longer than the model's context and were cut" in out


def test_texts_that_an_encoder_cannot_read_whole_are_counted(
    train, output, task_data, bert_folder, call, write_rows
):
    train(task="sst2", dataset_name=task_data, model_name_or_path=bert_folder, max_length=12)
    rows = [{"sentence": "warm", "label": 0}, {"sentence": "a film " * 9, "label": 1}]
    write_rows(task_data / "test.jsonl", rows)
    assert "1 prompts are longer than the model's context and were cut at their end" in (
        call("eval", output).out
    )


def test_an_encoder_is_measured_too(train, output, task_data, bert_folder, call):
    train(task="sst2", dataset_name=task_data, model_name_or_path=bert_folder)
    answer = call("eval", output)
    assert (answer.code, answer.err) == (0, "")
    assert "sst2, test: 6 examples, classification head" in answer.out
    sentence = call("eval", output, "--decode", "greedy").sentence
    assert "`--decode` is for language models" in sentence


def test_a_run_without_a_task_may_be_measured_on_one(train, output, call, task_data):
    train()
    assert call("eval", output, "--task", "sst2", "--data", task_data, "--limit", 2).code == 0


def test_bad_input_gets_a_sentence(finished, call, task_data):
    cases = [
        (["--limit", 0], "`--limit` is 0; it must be at least 1"),
        (["--split", "hard"], "has no split 'hard'; found: test, train, validation"),
        (["--task", "squad", "--data", task_data], "The task squad reads the columns context"),
        (["--task", "e2e", "--decode", "labels"], "e2e has none; use beam or greedy"),
        (["--data", "nowhere.jsonl"], "There is no file or folder 'nowhere.jsonl'"),
    ]
    for words, told in cases:
        assert told in call("eval", finished, *words).sentence
        assert not (finished / "eval").exists()


def test_a_folder_without_a_run(call, tmp_path):
    assert (
        "holds no adapter_config.json and no method.json, so no trained"
        in call("eval", tmp_path).sentence
    )
