"""Whole runs: from options to a folder that stock PEFT opens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trainers import Interrupted, KillAt, adapter, losses, present, ranks_now, without_seconds
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from loralloc.allocation.record import Record
from loralloc.methods.restore import saved_ranks
from loralloc.runs import folder as run_folder
from loralloc.runs import run as runs
from loralloc.runs.data import ROW
from loralloc.runs.trained import load_trained
from loralloc.training.seal import newest_whole

OPTIONS = {
    "lora_r": 2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "logging_steps": 1,
    "num_rounds": 2,
    "warmup_epochs": 0.5,
    "recovery_epochs": 0.5,
    "scoring_examples": 4,
    "use_cpu": True,
    "disable_tqdm": True,
}
WORDS = ("good", "bad")


def prompts(count):
    return [
        {"prompt": f"the film {number} is", "completion": f" {WORDS[number % 2]} and warm"}
        for number in range(count)
    ]


def messages(count):
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in prompts(count)
    ]


def alpaca(count):
    return [
        {"instruction": "rate the film", "input": str(number), "output": WORDS[number % 2]}
        for number in range(count)
    ]


def texts(count):
    return [{"text": row["prompt"] + row["completion"]} for row in prompts(count)]


def sst2(count):
    return [
        {"sentence": f"the film is {WORDS[number % 2]}", "label": number % 2}
        for number in range(count)
    ]


@pytest.fixture
def options_for(tmp_path, write_rows, llama_folder):
    """Options of a small run on rows of a kind, written as a folder of splits."""

    def options(rows, *, model=llama_folder, output="out", **more):
        folder = tmp_path / "data"
        write_rows(folder / "train.jsonl", rows(24))
        write_rows(folder / "validation.jsonl", rows(8))
        where = {"dataset_name": folder, "model_name_or_path": model}
        return {**OPTIONS, **where, "output_dir": tmp_path / output, **more}

    return options


def whole_run(options, **how):
    prepared = runs.prepare(options, **how)
    runs.train(prepared)
    return prepared


@pytest.mark.parametrize(
    ("rows", "task"),
    [(prompts, None), (messages, None), (alpaca, None), (texts, None), (sst2, "sst2")],
)
def test_a_run_on_every_form_of_data(rows, task, options_for):
    prepared = whole_run(options_for(rows, task=task))
    assert prepared.head.name == "lm"
    assert [entry.step for entry in prepared.allocation.record.rounds] == [3, 6]
    assert ranks_now(prepared.model) == present(prepared.allocation.record.ranks)
    trained = losses(prepared.trainer)
    assert trained[12] < trained[1]


def test_the_demo_task_needs_no_data(options_for):
    schedule = dict(max_steps=4, num_rounds=1, warmup_epochs=0.008, eval_strategy="no")
    prepared = whole_run(options_for(prompts, task="demo", dataset_name="demo", **schedule))
    assert {name: len(split.dataset) for name, split in prepared.splits.items()} == {
        "train": 1000,
        "validation": 100,
        "test": 100,
    }
    assert prepared.task.name == "demo"
    assert [entry.step for entry in prepared.allocation.record.rounds] == [2]


def test_classification_of_a_csv_file(tmp_path, options_for, bert_folder):
    rows = "".join(f"{row['sentence']},{WORDS[row['label']]}\n" for row in sst2(40))
    (tmp_path / "reviews.csv").write_text("review,verdict\n" + rows)
    data = dict(dataset_name=tmp_path / "reviews.csv", validation_examples=16)
    columns = dict(text_column="review", label_column="verdict")
    prepared = whole_run(options_for(sst2, **data, **columns, model=bert_folder))
    assert prepared.head.name == "classification"
    assert prepared.model.config.id2label == {0: "bad", 1: "good"}
    assert len(prepared.allocation.record.rounds) == 2
    accuracies = [
        e["eval_accuracy"] for e in prepared.trainer.state.log_history if "eval_accuracy" in e
    ]
    assert accuracies[-1] > 0.9


def test_a_known_task_classifies_with_an_encoder(options_for, bert_folder):
    prepared = runs.prepare(options_for(sst2, task="sst2", model=bert_folder))
    assert prepared.head.name == "classification"
    assert prepared.model.config.id2label == {0: "negative", 1: "positive"}


def test_a_language_model_can_classify(options_for, llama_folder):
    head = dict(task="sst2", head="classification")
    prepared = whole_run(options_for(sst2, **head, model=llama_folder))
    assert prepared.head.name == "classification"
    assert len(prepared.allocation.record.rounds) == 2


def test_an_encoder_cannot_generate(options_for, bert_folder):
    with pytest.raises(ValueError, match="is an encoder and cannot generate"):
        runs.prepare(options_for(sst2, task="sst2", head="lm", model=bert_folder))


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory, llama_folder, bert_folder):
    """A finished run of each kind, in which some modules left the adapter."""

    def train(kind, rows, model):
        folder = tmp_path_factory.mktemp(kind)
        for name, count in (("train", 24), ("validation", 8)):
            path = folder / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
        where = dict(dataset_name=folder / "data", model_name_or_path=model)
        where["output_dir"] = folder / "run"
        prepared = whole_run({**OPTIONS, **where, "ranks_per_round": "model"})
        assert 0 in prepared.allocation.record.ranks.values()
        return prepared, folder / "run"

    return {
        "lm": train("lm", prompts, llama_folder),
        "classification": train("classification", sst2, bert_folder),
    }


@pytest.fixture(params=["lm", "classification"])
def finished(request, finished_runs):
    """One of them, with its folder."""
    return finished_runs[request.param]


def test_the_run_folder_is_whole_and_holds_no_pickle(finished):
    _, folder = finished
    assert {path.name for path in folder.iterdir() if path.is_file()} >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "allocation.json",
        "metrics.jsonl",
        "settings.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}
    assert newest_whole(folder) == folder / "checkpoint-12"


def test_the_record_is_the_runs_and_fits_the_weights(finished):
    prepared, folder = finished
    record = Record.load(folder)
    assert record.rounds == prepared.allocation.record.rounds
    assert saved_ranks(folder) == present(record.ranks)


def test_metrics_hold_every_log_entry(finished):
    prepared, folder = finished
    lines, logged = read_metrics(folder), prepared.trainer.state.log_history
    assert [line["step"] for line in lines] == [entry["step"] for entry in logged]
    assert {"loss", "eval_loss", "round", "train_runtime"} <= set().union(*lines)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_settings_are_saved_with_their_sources(finished):
    _, folder = finished
    data = json.loads((folder / "settings.json").read_text())
    assert data["lora_r"] == {"value": 2, "source": "Python"}
    assert data["lora_alpha"]["source"] == "loralloc default"


def test_the_card_says_how_to_load_the_adapter(finished):
    prepared, folder = finished
    card = (folder / "README.md").read_text()
    base = prepared.settings.model.model_name_or_path
    labels = ", num_labels=2" if prepared.head.name == "classification" else ""
    assert f'.from_pretrained("{base}"{labels})' in card
    auto = "CausalLM" if prepared.head.name == "lm" else "SequenceClassification"
    assert f"AutoModelFor{auto}" in card
    assert "Rounds: 2" in card


STOCK = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CLASSES = {"lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
found, *runs = sys.argv[1:]
logits = {}
for head, folder, base in zip(runs[::3], runs[1::3], runs[2::3]):
    model = PeftModel.from_pretrained(CLASSES[head].from_pretrained(base), folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)("the film is good", return_tensors="pt")
    with torch.no_grad():
        logits[head] = model(**inputs).logits
        logits[head + ", merged"] = model.merge_and_unload()(**inputs).logits
assert "loralloc" not in sys.modules
torch.save(logits, found)
"""


def test_stock_peft_opens_the_adapters_without_loralloc(finished_runs, tmp_path):
    command = [sys.executable, "-c", STOCK, tmp_path / "found"]
    for head, (prepared, folder) in finished_runs.items():
        command += [head, folder, prepared.settings.model.model_name_or_path]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found = torch.load(tmp_path / "found")
    for head, (prepared, _) in finished_runs.items():
        expected = logits_of(prepared.model, prepared.tokenizer)
        torch.testing.assert_close(found[head], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[f"{head}, merged"], expected, rtol=0, atol=1e-5)
        with prepared.model.disable_adapter():
            assert not torch.allclose(logits_of(prepared.model, prepared.tokenizer), expected)


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer("the film is good", return_tensors="pt")).logits


def test_an_encoder_whose_file_lacks_the_pooler(tmp_path, options_for, bert_folder):
    """What is drawn at random and not trained must not be drawn again when the run is opened."""
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    masked = BertForMaskedLM(BertConfig.from_pretrained(bert_folder))
    masked.save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    prepared = whole_run(options_for(sst2, task="sst2", model=tmp_path / "masked"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")
    opened = PeftModel.from_pretrained(base, tmp_path / "out")
    expected = logits_of(prepared.model, tokenizer)
    torch.testing.assert_close(logits_of(opened, tokenizer), expected, rtol=0, atol=1e-5)


def test_a_finished_language_model_run_opens_again(finished):
    prepared, folder = finished
    if prepared.head.name == "classification":
        with pytest.raises(ValueError, match="is for SEQ_CLS, which generates no text"):
            load_trained(folder)
        return
    model, tokenizer = load_trained(folder)
    assert tokenizer.eos_token == prepared.tokenizer.eos_token
    torch.testing.assert_close(adapter(model), adapter(prepared.model), rtol=0, atol=0)
    base, _ = load_trained(folder, with_adapter=False)
    assert not hasattr(base, "peft_config")


def test_a_folder_without_an_adapter_does_not_open(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json .*so no trained adapter"):
        load_trained(tmp_path)


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ("lm", "classification"))
def test_a_killed_run_goes_on_as_if_it_had_not_been(kind, options_for, bert_folder, tmp_path):
    rows, more = (prompts, {}) if kind == "lm" else (sst2, dict(model=bert_folder))
    more |= dict(save_strategy="steps", save_steps=5, lora_dropout=0.1)
    whole = whole_run(options_for(rows, output="whole", **more))
    killed = runs.prepare(options_for(rows, **more))
    killed.trainer.add_callback(KillAt(8))
    with pytest.raises(Interrupted):
        runs.train(killed)
    resumed = whole_run(options_for(rows, **more), resume=True)
    assert resumed.checkpoint.name == "checkpoint-5"
    assert without_seconds(resumed.allocation.record.rounds) == without_seconds(
        whole.allocation.record.rounds
    )
    torch.testing.assert_close(adapter(resumed.model), adapter(whole.model), rtol=0, atol=1e-6)
    assert losses(resumed.trainer) == pytest.approx(losses(whole.trainer), abs=1e-6)
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "out")]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
    # Steps 6 to 8 were done twice; the metrics have each once.
    logged = [entry["step"] for entry in read_metrics(tmp_path / "out") if "loss" in entry]
    assert logged == sorted(set(logged))


def test_the_same_seed_gives_the_same_run(options_for):
    first, second = (whole_run(options_for(prompts, output=name)) for name in ("one", "two"))
    assert without_seconds(first.allocation.record.rounds) == without_seconds(
        second.allocation.record.rounds
    )
    assert losses(first.trainer) == losses(second.trainer)


def test_another_seed_gives_another_run(options_for):
    first, second = (whole_run(options_for(prompts, seed=seed, output=seed)) for seed in ("1", "2"))
    assert losses(first.trainer) != losses(second.trainer)


@pytest.mark.parametrize("kind", ("lm", "classification"))
def test_the_best_checkpoint_is_loaded(kind, options_for, bert_folder):
    rows, more = (prompts, {}) if kind == "lm" else (sst2, dict(model=bert_folder))
    more |= dict(load_best_model_at_end=True, metric_for_best_model="loss")
    prepared = whole_run(options_for(rows, **more))
    assert prepared.trainer.state.best_model_checkpoint
    assert saved_ranks(prepared.settings.output_dir) == present(prepared.allocation.record.ranks)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "eval_packing": False, "num_train_epochs": 9, "recovery_epochs": 1},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"use_rslora": True},
        {"dtype": "bfloat16"},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": "all-linear"},
        {"score": "ablation", "allocation.budget": "parameters", "max_rank": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*attention implementation:UserWarning")
def test_options_of_trl_and_of_the_allocation_go_together(options, options_for):
    prepared = whole_run(options_for(texts, **options))
    assert len(prepared.allocation.record.rounds) == 2


@pytest.fixture
def held_out(tmp_path, write_rows, options_for):
    """The rows of 30 that are trained on, and the six held out."""
    path = write_rows(tmp_path / "all.jsonl", prompts(30))

    def rows(**more):
        data = dict(dataset_name=path, validation_examples=6)
        trainer = runs.prepare(options_for(prompts, **data, **more)).trainer
        return set(trainer.train_dataset[ROW]), set(trainer.eval_dataset[ROW])

    return rows


def test_a_development_set_is_held_out_where_there_is_none(held_out):
    train, validation = held_out()
    assert (len(train), len(validation)) == (24, 6)
    assert train | validation == set(range(1, 31))


def test_the_held_out_set_does_not_depend_on_the_runs_seed(held_out):
    assert held_out(seed=1) == held_out(seed=2)


def test_named_splits_are_taken(tmp_path, write_rows, options_for):
    options = options_for(prompts, dataset_train_split="part", dataset_test_split="held")
    for name, count in (("part", 20), ("held", 5)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", prompts(count))
    splits = runs.prepare(options).splits
    assert {name: len(split.dataset) for name, split in splits.items()} == {
        "train": 20,
        "validation": 5,
    }


def test_several_data_sets_are_mixed_as_in_trl(tmp_path, write_rows, options_for):
    for name in ("one", "two"):
        write_rows(tmp_path / name / "train.jsonl", prompts(20))
    path = tmp_path / "mix.yaml"
    path.write_text(f"datasets:\n  - path: {tmp_path}/one\n  - path: {tmp_path}/two\n")
    options = options_for(prompts, config=path, validation_examples=8)
    del options["dataset_name"]
    prepared = whole_run(options)
    assert len(prepared.trainer.train_dataset) == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float33"}, "float33"),
        ({"use_peft": False}, "`use_peft` is false; choose with `--method`"),
        ({"use_dora": True}, "uses `use_dora`, for which ranks cannot be allocated"),
        ({"task": "sst3"}, "There is no task 'sst3'"),
    ],
)
def test_what_does_not_fit_is_refused(options, words, options_for):
    with pytest.raises((ValueError, TypeError), match=words):
        runs.prepare(options_for(prompts, **options))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (24, "has 24 rows and no validation split, and `validation_examples` would hold out 24"),
        (0, "`validation_examples` is 0"),
    ],
)
def test_a_development_set_that_cannot_be_held_out(size, words, options_for, tmp_path):
    options = options_for(prompts, validation_examples=size)
    (tmp_path / "data" / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=words):
        runs.prepare(options)


def test_making_room_moves_the_run_and_nothing_else(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[1], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "eval" / "sst2-test-beam5").mkdir(parents=True)
    assert run_folder.holds_run(folder)
    run_folder.set_aside(folder)
    assert not run_folder.holds_run(folder) and not (folder / "eval").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("checkpoint-*")) and not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ("settings.json", "allocation.json", "adapter_config.json"))
def test_what_counts_as_a_run(name, tmp_path):
    assert not run_folder.holds_run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    assert not run_folder.holds_run(tmp_path)
    Path(tmp_path / name).write_text("{}")
    assert run_folder.holds_run(tmp_path)
