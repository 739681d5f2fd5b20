"""Pairs of texts on their way into a classifier, and runs that learn from them."""

import json

import encoders
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, TrainingArguments

from loralloc.evaluation.classifiers import predict_labels
from loralloc.runs import folder as run_folder
from loralloc.runs import run as runs
from loralloc.runs.heads.classification import classification_trainer
from loralloc.runs.models import longest_input
from loralloc.runs.run import HEADS
from loralloc.runs.trained import head_of, load_trained
from loralloc.tasks.columns import to_examples
from loralloc.tasks.source import Split

FIRST, SECOND = "the film of the year", "a cold place is bad"


def trainer_for(tmp_path, kind, *rows, max_length=None):
    path = encoders.folder(kind, tmp_path / kind)
    made = Split(name="train", dataset=Dataset.from_list(list(rows)), source="rows")
    return classification_trainer(
        AutoModelForSequenceClassification.from_pretrained(path),
        encoders.tokenizer(kind),
        TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True),
        {"train": made, "validation": made},
        max_length=max_length,
    )


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_the_model_reads_both_texts_as_its_tokenizer_joins_them(kind, tmp_path):
    trainer = trainer_for(tmp_path, kind, {"text": FIRST, "text_pair": SECOND, "label": 1})
    (row,) = trainer.train_dataset
    tokenizer = trainer.processing_class
    alone = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (FIRST, SECOND)]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    between = [sep] if kind == "bert" else [sep, sep]
    assert row["input_ids"] == [cls, *alone[0], *between, *alone[1], sep]
    assert row["labels"] == 1
    if kind == "bert":
        assert row["token_type_ids"] == [0] * (len(alone[0]) + 2) + [1] * (len(alone[1]) + 1)
    else:
        assert "token_type_ids" not in row
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("token_type_ids" in batch) == (kind == "bert")
    trainer.evaluate()


@pytest.mark.parametrize("kind", encoders.KINDS)
@pytest.mark.parametrize("repeats", [(1, 40), (40, 1), (40, 40)])
def test_a_pair_that_is_too_long_keeps_both_texts(kind, repeats, tmp_path):
    texts = [" ".join([text] * n) for text, n in zip((FIRST, SECOND), repeats, strict=True)]
    row = {"text": texts[0], "text_pair": texts[1], "label": 0}
    trainer = trainer_for(tmp_path, kind, row, max_length=40)
    ids, tokenizer = trainer.train_dataset[0]["input_ids"], trainer.processing_class
    parts = tokenizer.decode(ids).split(tokenizer.sep_token)
    first, second = (part.strip() for part in parts if part.strip())
    assert len(ids) == 40
    assert second.startswith("a cold place") and "the film of" in first
    # The short one of the two is whole.
    assert repeats[0] > 1 or first.endswith(FIRST)
    assert repeats[1] > 1 or second == SECOND


@pytest.mark.parametrize("max_length", (None, 1024, 16))
@pytest.mark.parametrize("kind", encoders.KINDS)
def test_a_text_is_cut_to_what_the_model_reads(kind, max_length, tmp_path):
    rows = {"text": FIRST * 50, "label": 0}, {"text": FIRST, "label": 1}
    trainer = trainer_for(tmp_path, kind, *rows, max_length=max_length)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert lengths[0] == min(64, max_length or 64)
    trainer.evaluate()


def test_the_longest_input_is_what_model_tokenizer_and_wish_allow():
    tokenizer = encoders.tokenizer("bert")
    assert longest_input(tiny.bert_classifier(), tokenizer) == 64
    roberta = tiny.roberta_classifier()  # position 0 is its padding's, and 64 are left but one
    assert longest_input(roberta, tokenizer) == 63
    assert longest_input(tiny.llama(), tokenizer) == 64
    assert longest_input(tiny.t5(), tokenizer, 100) == 100
    assert longest_input(tiny.bert_classifier(), tokenizer, 8) == 8
    assert longest_input(tiny.adapted(roberta), tokenizer) == 63
    tokenizer.model_max_length = 32
    assert longest_input(tiny.bert_classifier(), tokenizer) == 32


def pairs(count):
    """Whether the two texts name the same thing."""
    things = ("film", "place", "story")
    rows = []
    for number in range(count):
        first, second = things[number % 3], things[number % 3 if number % 2 else (number + 1) % 3]
        rows.append(
            {"a": f"the {first}", "b": f"a good {second}", "same": ("no", "yes")[number % 2]}
        )
    return rows


def rte(count):
    return [
        {
            "sentence1": row["a"],
            "sentence2": row["b"],
            "label": int(row["same"] == "no"),
        }
        for row in pairs(count)
    ]


@pytest.fixture
def whole_run(tmp_path):
    def run(kind, rows, **more):
        base = encoders.folder(kind, tmp_path / "base")
        for name, count in (("train", 24), ("validation", 12)):
            path = tmp_path / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
        options = dict(
            dataset_name=tmp_path / "data",
            model_name_or_path=base,
            output_dir=tmp_path / "out",
            lora_r=2,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            num_rounds=2,
            warmup_epochs=0.5,
            recovery_epochs=0.5,
            scoring_examples=4,
            use_cpu=True,
            disable_tqdm=True,
        )
        prepared = runs.prepare({**options, **more})
        runs.train(prepared)
        return prepared

    return run


@pytest.mark.parametrize("kind", encoders.KINDS)
def test_a_run_on_pairs_of_a_task_opens_again_with_its_head_and_labels(kind, whole_run):
    prepared = whole_run(kind, rte, task="rte")
    assert prepared.head is HEADS["classification"]
    assert len(prepared.allocation.record.rounds) == 2
    folder = prepared.settings.output_dir
    assert head_of(folder) is HEADS["classification"]
    model, tokenizer = load_trained(folder, head=HEADS["classification"])
    assert model.config.id2label == {0: "entailment", 1: "not entailment"}
    examples = to_examples(prepared.splits["validation"], prepared.task)
    expected = predict_labels(prepared.model, prepared.tokenizer, examples)
    assert predict_labels(model, tokenizer, examples) == expected
    inputs = prepared.trainer.data_collator([prepared.trainer.eval_dataset[i] for i in range(4)])
    base = AutoModelForSequenceClassification.from_pretrained(
        prepared.settings.model.model_name_or_path, num_labels=2, dtype=torch.float32
    )
    opened = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        ours, theirs = prepared.model.eval()(**inputs).logits, opened(**inputs).logits
        merged = opened.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)


def test_a_run_on_pairs_without_a_task_names_its_columns(whole_run):
    columns = dict(text_column="a", text_pair_column="b", label_column="same")
    prepared = whole_run("bert", pairs, **columns)
    types = {kind for row in prepared.trainer.train_dataset for kind in row["token_type_ids"]}
    assert types == {0, 1}
    folder = prepared.settings.output_dir
    assert json.loads((folder / "labels.json").read_text()) == ["no", "yes"]
    assert "from_pretrained(" in (card := (folder / "README.md").read_text())
    assert ", num_labels=2)" in card
    run_folder.set_aside(folder)
    assert not (folder / "labels.json").exists()


def test_a_classifier_without_the_names_of_its_labels_is_refused(whole_run):
    folder = whole_run("bert", rte, task="rte").settings.output_dir
    (folder / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"holds no labels\.json, so its labels have no names"):
        load_trained(folder, head=HEADS["classification"])
    with pytest.raises(ValueError, match="for SEQ_CLS, which has no span head"):
        load_trained(folder, head=HEADS["span"])
