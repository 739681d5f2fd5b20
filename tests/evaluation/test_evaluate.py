import json
import shutil

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from loralloc.evaluation import evaluate
from loralloc.evaluation.classifiers import predict_labels
from loralloc.evaluation.generation import generate
from loralloc.evaluation.labels import score_labels
from loralloc.evaluation.metrics import measure
from loralloc.evaluation.request import Request
from loralloc.evaluation.spans import predict_spans
from loralloc.runs.folder import save_conversation, save_labels
from loralloc.runs.run import HEADS
from loralloc.runs.trained import load_trained
from loralloc.tasks.catalog import get_task
from loralloc.tasks.columns import merge_references, to_examples
from loralloc.tasks.conversations import Common
from loralloc.tasks.source import load_splits

SENTENCES = [
    "a warm film",
    "cold and bad",
    "the story of a good place is good and warm",
    "🎬 👩‍👩‍👧 on two\u2028lines",
    "الفيلم جيد جدا",
    "bad",
    "the film is good",
]
SST2 = [{"sentence": text, "label": number % 2} for number, text in enumerate(SENTENCES)]
E2E = [
    {"meaning_representation": f"name[{name}]", "human_reference": f"{name} is {kind}."}
    for name in ("Aromi", "The Mill", "Blue Spice")
    for kind in ("a pub", "warm", "cheap")
]
SQUAD = [
    {
        "context": "the film is good and the place is warm",
        "question": question,
        "answers": {"text": [answer], "answer_start": [start]},
    }
    for question, answer, start in (("the film is", "good", 12), ("the place is", "warm", 34))
]


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Models are loaded in float32, where batches differ by rounding only."""
    monkeypatch.setattr("loralloc.runs.models.fastest_dtype", lambda: torch.float32)


def write_run(folder, base, tokenizer, *, backbone, task=None, data=None):
    """A run folder as training leaves it."""
    tiny.with_trained_b(base).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = {"model_name_or_path": str(backbone), "task": task, "dataset_name": data}
    given = {name: {"value": str(value)} for name, value in values.items() if value}
    (folder / "settings.json").write_text(json.dumps(given))
    return folder


@pytest.fixture
def data(tmp_path, write_rows):
    write_rows(tmp_path / "sst2" / "test.jsonl", SST2)
    write_rows(tmp_path / "e2e" / "test.jsonl", E2E)
    write_rows(tmp_path / "squad" / "test.jsonl", SQUAD)
    return tmp_path


@pytest.fixture
def run(tmp_path, llama_folder, data):
    """A language model's run on SST-2."""
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    return write_run(
        tmp_path / "run",
        tiny.adapted(base),
        tokenizer,
        backbone=llama_folder,
        task="sst2",
        data=data / "sst2",
    )


@pytest.fixture
def classifier_run(tmp_path, bert_folder, data):
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    folder = write_run(
        tmp_path / "classifier",
        tiny.adapted(base, modules_to_save=["classifier"]),
        AutoTokenizer.from_pretrained(bert_folder),
        backbone=bert_folder,
        task="sst2",
        data=data / "sst2",
    )
    save_labels(folder, get_task("sst2").labels)
    return folder


@pytest.fixture
def span_run(tmp_path, bert_folder, data):
    base = AutoModelForQuestionAnswering.from_pretrained(bert_folder)
    return write_run(
        tmp_path / "spans",
        tiny.adapted(base, task_type="QUESTION_ANS", modules_to_save=["qa_outputs"]),
        AutoTokenizer.from_pretrained(bert_folder),
        backbone=bert_folder,
        task="squad",
        data=data / "squad",
    )


def evaluated(run, *, on_batch=None, **options):
    """Everything in one go; returns the figures."""
    evaluation = evaluate.prepare(Request(run=run, **options))
    call = None
    if evaluation.num_left:
        call = evaluate.predict(evaluation, evaluate.load(evaluation), on_batch=on_batch)
    return evaluate.finish(evaluation, call)


def kept(folder):
    """What `eval.json` and `predictions.jsonl` say."""
    lines = (folder / "predictions.jsonl").read_text().split("\n")[:-1]
    return json.loads((folder / "eval.json").read_text()), [json.loads(line) for line in lines]


def examples_of(task, data):
    return to_examples(load_splits(data)["test"], get_task(task))


def test_beams_are_what_generate_gives(run, data, llama_folder):
    figures = evaluated(run, batch_size=2)
    task, examples = get_task("sst2"), examples_of("sst2", data / "sst2")
    model, tokenizer = load_trained(run)
    longest = max(len(tokenizer(f" {label}")["input_ids"]) for label in task.labels)
    expected = generate(
        model, tokenizer, [e.prompt for e in examples], max_new_tokens=longest + 1, num_beams=5
    )
    result, lines = kept(run / "eval" / "sst2-test-beam5")
    assert [line["prediction"] for line in lines] == expected
    assert [line["prompt"] for line in lines] == [e.prompt for e in examples]
    assert [line["gold"] for line in lines] == [e.response for e in examples]
    assert {line["score"] for line in lines} <= {0.0, 100.0}
    assert figures == measure(task.metrics, expected, examples, labels=task.labels)
    assert result["figures"][0]["name"] == "accuracy" and result["figures"][0]["implementation"]
    assert result["settings"].pop("adapter").startswith("sha256:")
    assert result["settings"] == {
        "model": str(llama_folder),
        "head": "lm",
        "task": "sst2",
        "split": "test",
        "decode": "beam",
        "num_beams": 5,
        "max_new_tokens": longest + 1,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    assert result["num_examples"] == result["num_in_split"] == len(SST2)
    assert result["source"].endswith("test.jsonl")
    assert result["last_call"]["num_predicted"] == len(SST2)
    assert result["last_call"]["dtype"] == "float32"
    assert set(result["versions"]) >= {"loralloc", "torch", "transformers", "peft"}


def test_labels_are_the_most_probable(run, data):
    evaluated(run, decode="labels", batch_size=3)
    task, examples = get_task("sst2"), examples_of("sst2", data / "sst2")
    scores = score_labels(*load_trained(run), [e.prompt for e in examples], task.labels)
    result, lines = kept(run / "eval" / "sst2-test-labels")
    assert [line["prediction"] for line in lines] == [task.labels[i] for i in scores.argmax(1)]
    assert result["settings"]["decode"] == "labels"
    assert not {"num_beams", "max_new_tokens"} & set(result["settings"])


@pytest.mark.parametrize("decode", ("greedy", "labels"))
def test_a_run_on_conversations_is_asked_in_one(decode, run, data):
    conversation = Common(system="Be brief.")
    save_conversation(run, conversation)
    evaluated(run, decode=decode)
    task, examples = get_task("sst2"), examples_of("sst2", data / "sst2")
    asked = [conversation.ask(e.prompt) for e in examples]
    model, tokenizer = load_trained(run)
    if decode == "labels":
        best = score_labels(model, tokenizer, asked, task.labels).argmax(1)
        expected = [task.labels[i] for i in best]
    else:
        longest = max(len(tokenizer(label)["input_ids"]) for label in task.labels)
        expected = generate(model, tokenizer, asked, max_new_tokens=longest + 1)
    result, lines = kept(run / "eval" / f"sst2-test-{decode}")
    assert [line["prediction"] for line in lines] == expected
    assert result["settings"]["conversation"] == conversation.as_data()


def test_one_prediction_a_meaning_representation(run, data):
    evaluated(run, task="e2e", data=str(data / "e2e"), decode="greedy", max_new_tokens=4)
    result, lines = kept(run / "eval" / "e2e-test-greedy")
    examples = merge_references(examples_of("e2e", data / "e2e"))
    assert len(lines) == result["num_in_split"] == 3
    assert [line["gold"] for line in lines] == [list(e.references) for e in examples]
    assert all(len(line["gold"]) == 3 for line in lines)


def test_rows_with_one_prompt_stay_apart_where_labels_are_right_or_wrong(run, data, write_rows):
    write_rows(data / "sst2" / "test.jsonl", [SST2[0], SST2[0]])
    evaluated(run, decode="labels")
    assert len(kept(run / "eval" / "sst2-test-labels")[1]) == 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(), "sst2-test-beam5"),
        (dict(num_beams=2), "sst2-test-beam2"),
        (dict(num_beams=1), "sst2-test-greedy"),
        (dict(decode="labels", base=True), "sst2-test-labels-base"),
    ],
)
def test_every_evaluation_has_its_own_folder(options, name, run):
    evaluation = evaluate.prepare(Request(run=run, **options))
    assert evaluation.predictions.folder == run / "eval" / name
    assert not (run / "eval").exists()  # nothing is written before there is a prediction


@pytest.mark.parametrize("task", ("squad", "e2e"))
def test_free_texts_have_room(task, run, data):
    request = Request(run=run, task=task, data=str(data / task))
    assert evaluate.prepare(request).decoding.max_new_tokens == {"squad": 64, "e2e": 128}[task]


def test_without_the_adapter(run, data):
    evaluated(run, base=True, decode="greedy", max_new_tokens=8)
    evaluated(run, decode="greedy", max_new_tokens=8)
    folder = run / "eval"
    base, lines = kept(folder / "sst2-test-greedy-base")
    assert base["settings"]["adapter"] is None
    assert lines != kept(folder / "sst2-test-greedy")[1]
    model, tokenizer = load_trained(run, with_adapter=False)
    prompts = [e.prompt for e in examples_of("sst2", data / "sst2")]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [line["prediction"] for line in lines] == expected


class Stopped(Exception):
    pass


@pytest.mark.parametrize("decode", ("beam", "labels"))
def test_it_goes_on_where_it_was_interrupted(decode, run, tmp_path):
    options = dict(decode=decode, batch_size=2)

    def stop(done):
        raise Stopped

    for num_done in (2, 4):
        with pytest.raises(Stopped):
            evaluated(run, output_dir=tmp_path / "parts", on_batch=stop, **options)
        result, lines = kept(tmp_path / "parts")
        assert result["figures"] is None and len(lines) == num_done
        # The machine goes down while a line is written.
        with (tmp_path / "parts" / "predictions.jsonl").open("a") as file:
            file.write('{"index": 5, "pro')
    done = []
    figures = evaluated(run, output_dir=tmp_path / "parts", on_batch=done.append, **options)
    assert done == [6, 7]
    assert figures == evaluated(run, output_dir=tmp_path / "whole", **options)
    parts, whole = kept(tmp_path / "parts"), kept(tmp_path / "whole")
    assert parts[1] == whole[1]
    assert parts[0].pop("last_call")["num_predicted"] == 3
    assert whole[0].pop("last_call")["num_predicted"] == 7
    assert parts[0] == whole[0]


def test_what_is_done_needs_no_model(run, monkeypatch):
    figures = evaluated(run)
    before = kept(run / "eval" / "sst2-test-beam5")
    monkeypatch.delattr("loralloc.evaluation.predictors.load_trained")
    assert evaluated(run) == figures
    assert kept(run / "eval" / "sst2-test-beam5") == before


def test_more_examples_go_on_from_fewer(run):
    evaluated(run, decode="labels", limit=3)
    result, lines = kept(run / "eval" / "sst2-test-labels")
    assert (result["num_examples"], result["num_in_split"], len(lines)) == (3, 7, 3)
    evaluated(run, decode="labels")
    assert kept(run / "eval" / "sst2-test-labels")[0]["last_call"]["num_predicted"] == 4
    with pytest.raises(ValueError, match="more than the 3 examples asked for; raise `--limit`, or"):
        evaluated(run, decode="labels", limit=3)
    evaluated(run, decode="labels", limit=3, overwrite=True)
    assert len(kept(run / "eval" / "sst2-test-labels")[1]) == 3


def _other_adapter(run, data):
    tokens = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").write_bytes(tokens[:-4] + b"\0\0\0\0")


def _other_gold(run, data):
    rows = [*SST2[:4], {**SST2[4], "label": 1}, *SST2[5:]]
    (data / "sst2" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (_other_adapter, {}, "holds predictions with adapter 'sha256:"),
        (_other_gold, {}, "of other data, which differs first in example 5; replace them"),
        (lambda *_: None, dict(max_new_tokens=3), "with max_new_tokens .* is 3 now; replace them"),
    ],
)
def test_predictions_of_something_else_are_not_mixed_in(change, options, words, run, data):
    evaluated(run)
    change(run, data)
    before = kept(run / "eval" / "sst2-test-beam5")
    with pytest.raises(ValueError, match=words):
        evaluated(run, **options)
    assert kept(run / "eval" / "sst2-test-beam5") == before
    evaluated(run, overwrite=True, **options)
    assert kept(run / "eval" / "sst2-test-beam5") != before


@pytest.mark.parametrize("decode", ("beam", "labels"))
def test_prompts_longer_than_the_context_are_cut_and_counted(decode, run, data, write_rows):
    rows = [SST2[0], {"sentence": "x" * 100_000, "label": 0}]
    write_rows(data / "sst2" / "test.jsonl", rows)
    evaluated(run, decode=decode)
    way = {"beam": "beam5", "labels": "labels"}[decode]
    result, lines = kept(run / "eval" / f"sst2-test-{way}")
    assert result["num_truncated"] == 1
    assert [line.get("truncated") for line in lines] == [None, True]
    assert len(lines[1]["prompt"]) > 100_000


def test_a_classifier(classifier_run, data):
    figures = evaluated(classifier_run, batch_size=2)
    task, examples = get_task("sst2"), examples_of("sst2", data / "sst2")
    model, tokenizer = load_trained(classifier_run, head=HEADS["classification"])
    expected = predict_labels(model, tokenizer, examples)
    result, lines = kept(classifier_run / "eval" / "sst2-test-classification")
    assert [line["prediction"] for line in lines] == expected
    assert [line["prompt"] for line in lines] == SENTENCES
    assert figures == measure(task.metrics, expected, examples, labels=task.labels)
    assert result["settings"]["head"] == "classification" and "decode" not in result["settings"]


def test_a_span_head(span_run, data):
    evaluated(span_run, batch_size=1)
    examples = examples_of("squad", data / "squad")
    expected = predict_spans(*load_trained(span_run, head=HEADS["span"]), examples)
    _, lines = kept(span_run / "eval" / "squad-test-span")
    assert [line["prediction"] for line in lines] == expected
    assert lines[0]["prompt"] == f"{SQUAD[0]['question']}\n{SQUAD[0]['context']}"
    assert lines[0]["gold"] == ["good"]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (dict(decode="greedy"), "decode"),
        (dict(num_beams=5), "num_beams"),
        (dict(max_new_tokens=5), "max_new_tokens"),
        (dict(base=True), "base"),
    ],
)
def test_encoders_have_no_decoding(options, flag, classifier_run):
    words = f"`--{flag}` is for language models, .* has a classification head; leave it out"
    with pytest.raises(ValueError, match=words):
        evaluated(classifier_run, **options)


def test_a_classifier_of_other_labels(classifier_run, data, write_rows):
    row = {"sentence1": "a", "sentence2": "b", "label": 0}
    write_rows(data / "rte" / "test.jsonl", [row])
    words = "has the labels negative, positive, and those of the task rte are entailment"
    with pytest.raises(ValueError, match=words):
        evaluated(classifier_run, task="rte", data=str(data / "rte"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(decode="beam", num_beams=1), "1, which is no beam search; use `--decode greedy`"),
        (dict(decode="greedy", num_beams=5), "5, but `--decode greedy` has no beams"),
        (dict(decode="labels", num_beams=5), "5, but `--decode labels` has no beams"),
        (dict(decode="labels", max_new_tokens=5), "`--decode labels` generates none"),
        (dict(task="e2e", decode="labels"), "scores the labels of a task, and e2e has none"),
        (dict(task="alpaca"), "The task alpaca is only trained on and has no metric"),
        (dict(task="mt_bench"), "compared by a judge; use `loralloc judge`"),
        (dict(task="sst"), r"no task 'sst' \(did you mean 'sst2'\?\)"),
        (dict(split="validation"), "has no validation split, only test; name one with `--split`"),
        (dict(split="hard"), "has no split 'hard'; found: test"),
        (dict(limit=0), "`--limit` is 0; it must be at least 1"),
        (dict(batch_size=0), "`--batch_size` is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options, words, run):
    with pytest.raises(ValueError, match=words):
        evaluated(run, **options)
    assert not (run / "eval").exists()


def test_a_split_by_its_own_name(run, data):
    shutil.copy(data / "sst2" / "test.jsonl", data / "sst2" / "hard.jsonl")
    evaluated(run, split="hard", decode="labels")
    result, _ = kept(run / "eval" / "sst2-hard-labels")
    assert result["source"].endswith("hard.jsonl")


def test_a_split_without_labels(run, data, write_rows):
    write_rows(data / "sst2" / "test.jsonl", [{"sentence": "a", "label": -1}])
    with pytest.raises(ValueError, match="the mark of a hidden label: choose a split with labels"):
        evaluated(run)


def test_a_run_without_a_task(run, data):
    (run / "settings.json").unlink()
    with pytest.raises(ValueError, match="without a task, so there is no metric; name a task"):
        evaluated(run)
    evaluated(run, task="sst2", data=str(data / "sst2"), decode="labels")


@pytest.mark.parametrize("missing", ("adapter_config.json", "adapter_model.safetensors"))
def test_a_folder_without_an_adapter(missing, run):
    (run / missing).unlink()
    with pytest.raises(ValueError, match=rf"holds no {missing}.*, so no trained adapter"):
        evaluated(run)
