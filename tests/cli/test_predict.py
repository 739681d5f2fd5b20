"""`loralloc predict`: rows in, rows with labels and probabilities out."""

import csv
import io

import pytest
import torch

from loralloc.runs.heads.classification import CLASSIFICATION
from loralloc.runs.trained import load_trained

TEXTS = ("the film is good", "a bad story of a cold place", "the place is warm")
RUN = ("num_rounds", "warmup_epochs", "recovery_epochs", "scoring_examples")


@pytest.fixture
def classifier(train, output, data, write_rows, bert_folder):
    """A run on labels of its own, by name."""
    for split, count in (("train", 24), ("validation", 8)):
        rows = [
            {"note": TEXTS[number % 3], "kind": ("calm", "loud", "odd")[number % 3]}
            for number in range(count)
        ]
        write_rows(data / f"{split}.jsonl", rows)
    answer = train(
        model_name_or_path=bert_folder,
        text_column="note",
        label_column="kind",
        num_train_epochs=4,
    )
    assert answer.code == 0, answer.err
    assert f"label rows: loralloc predict {output} new.csv" in answer.out
    return output


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("id,note\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)))
    return path


def test_every_row_gets_its_label_and_probabilities(classifier, notes, call):
    answer = call("predict", classifier, notes)
    assert (answer.code, answer.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    names = ["p(calm)", "p(loud)", "p(odd)"]
    assert list(rows[0]) == ["id", "note", "predicted", *names]
    assert [row["note"] for row in rows] == list(TEXTS)
    model, tokenizer = load_trained(classifier, head=CLASSIFICATION)
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["note"], return_tensors="pt")).logits[0]
        shares = logits.softmax(dim=-1).tolist()
        assert [float(row[name]) for name in names] == pytest.approx(shares, abs=2e-6)
        assert row["predicted"] == ("calm", "loud", "odd")[int(logits.argmax())]
    assert len({row["p(calm)"] for row in rows}) == 3


def test_a_file_is_written_once(classifier, notes, call, tmp_path):
    out = tmp_path / "labelled.csv"
    first = call("predict", classifier, notes, "--output", out)
    assert first.out.startswith("3 rows: ")
    assert len(out.read_text().splitlines()) == 4
    assert "is there already" in call("predict", classifier, notes, "--output", out).sentence
    assert call("predict", classifier, notes, "--output", out, "--overwrite").code == 0
    before = out.read_text()
    twice = call("predict", classifier, out, "--output", out, "--overwrite").sentence
    assert "has a column 'predicted' already" in twice and out.read_text() == before
    nowhere = tmp_path / "new" / "x.csv"
    assert "There is no folder" in call("predict", classifier, notes, "--output", nowhere).sentence


def test_what_cannot_be_predicted_gets_a_sentence(classifier, tmp_path, call, write_rows):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "warm"}])
    said = call("predict", classifier, other).sentence
    assert said == f"{other} has the columns text, and the run reads note; it lacks note."
    number = write_rows(tmp_path / "number.jsonl", [{"note": "warm"}, {"note": 3}])
    assert "Row 2 of" in call("predict", classifier, number).sentence
    twice = write_rows(tmp_path / "twice.jsonl", [{"note": "warm", "predicted": "x"}])
    assert "has a column 'predicted' already" in call("predict", classifier, twice).sentence
    assert "There is no file" in call("predict", classifier, tmp_path / "none.csv").sentence
    (tmp_path / "rows.tsv").write_text("note\nwarm\n")
    said = call("predict", classifier, tmp_path / "rows.tsv").sentence
    assert "is of another kind; give a CSV" in said


def test_a_run_on_a_task_needs_no_label_either(train, output, data, write_rows, bert_folder, call):
    rows = [{"sentence": TEXTS[n % 3], "label": n % 2} for n in range(24)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "validation.jsonl", rows[:8])
    assert train(task="sst2", model_name_or_path=bert_folder).code == 0
    path = write_rows(data / "new.jsonl", [{"sentence": text} for text in TEXTS])
    answer = call("predict", output, path)
    lines = answer.out.splitlines()
    assert lines[0] == "sentence,predicted,p(negative),p(positive)"
    assert len(lines) == 4


def test_a_language_model_is_referred_to_other_verbs(train, output, notes, call):
    train()
    assert "`loralloc generate` for texts" in call("predict", output, notes).sentence
