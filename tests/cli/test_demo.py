import json

import pytest

from loralloc.cli import demo
from loralloc.tasks import demo_grammar, source

SHORT = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "ranks_per_round": 5,
    "warmup_epochs": 0.2,
    "recovery_epochs": 0.1,
    "scoring_examples": 4,
}


@pytest.fixture
def short_demo(monkeypatch, llama_folder):
    """The demo with a tiny model, 40 examples and 6 steps."""
    rows = {name: part[:40] for name, part in demo_grammar.demo_rows().items()}
    monkeypatch.setattr(source, "demo_rows", lambda: rows)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    options = {**demo.OPTIONS, **SHORT, "model_name_or_path": llama_folder}
    monkeypatch.setattr(demo, "OPTIONS", options)


def test_the_demo_compares_before_with_after(short_demo, call, output):
    answer = call("demo", "--output_dir", output)
    assert (answer.code, answer.err) == (0, "")
    for words in ("BLEU", "before", "after", "facts", f"adapter: {output}/"):
        assert words in answer.out
    assert sum(line.startswith("round ") for line in answer.out.splitlines()) == 3
    assert "q_proj" in answer.out or "q" in answer.out.split()
    data = json.loads((output / "demo.json").read_text())
    assert data["after"]["test_loss"] < data["before"]["test_loss"]
    assert 0 <= data["after"]["test_bleu"]["value"] <= 100
    assert "version:" in data["after"]["test_bleu"]["implementation"]
    assert (output / "adapter_model.safetensors").is_file()


def test_three_sentences_are_shown(short_demo, call, output):
    lines = [line.split() for line in call("demo", "--output_dir", output).out.splitlines()]
    firsts = [words[0] for words in lines if words]
    assert firsts.count("facts") == firsts.count("after") == demo.SHOWN


def test_a_folder_that_holds_a_run_is_left_alone(short_demo, call, output):
    output.mkdir()
    (output / "settings.json").write_text("{}")
    sentence = call("demo", "--output_dir", output).sentence
    assert f"{output} already holds a run; replace it with `--overwrite`" in sentence
    assert (output / "settings.json").read_text() == "{}"


def test_overwrite_replaces_it(short_demo, call, output):
    output.mkdir()
    (output / "settings.json").write_text("{}")
    assert call("demo", "--output_dir", output, "--overwrite").code == 0
    assert json.loads((output / "settings.json").read_text())["task"]["value"] == "demo"


def test_the_demos_rounds_fit_its_run():
    """As the docstring of its options says."""
    from loralloc.allocation.schedule import place_rounds
    from loralloc.runs.settings import resolve

    settings = resolve(demo.OPTIONS)
    per_epoch = 1000 // settings.training.per_device_train_batch_size
    schedule = place_rounds(
        settings.allocation, steps_per_epoch=per_epoch, max_steps=settings.training.max_steps
    )
    assert (schedule.steps, schedule.note) == ((31, 50, 69), "")
