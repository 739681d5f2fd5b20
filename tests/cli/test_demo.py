import itertools
import json

import pytest

from loralloc.allocation.record import Record
from loralloc.cli import demo
from loralloc.runs import run as runs
from loralloc.runs.folder import claim
from loralloc.tasks import demo_grammar, source

SHORT = {"per_device_train_batch_size": 4, "ranks_per_round": 5, "scoring_examples": 4}


@pytest.fixture
def short_demo(monkeypatch, llama_folder):
    """The demo with a tiny model, 40 examples and 16 steps, or 8 where these would take long."""
    rows = {name: part[:40] for name, part in demo_grammar.demo_rows().items()}
    monkeypatch.setattr(source, "demo_rows", lambda: rows)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(demo, "MOST_STEPS", 16)
    monkeypatch.setattr(demo, "FEWEST_STEPS", 8)
    options = {**demo.OPTIONS, **SHORT, "model_name_or_path": llama_folder}
    monkeypatch.setattr(demo, "OPTIONS", options)


def test_the_demo_compares_with_the_model_before_and_with_lora(short_demo, call, output):
    answer = call("demo", "--output_dir", output)
    assert (answer.code, answer.err) == (0, "")
    for words in ("BLEU", "before", " LoRA ", " ALoRA ", "facts", f"adapter: {output}/"):
        assert words in answer.out
    assert sum(line.startswith("round ") for line in answer.out.splitlines()) == 3
    assert "q_proj" in answer.out or "q" in answer.out.split()
    data = json.loads((output / "demo.json").read_text())
    for trained in ("lora", "after"):
        assert data[trained]["test_loss"] < data["before"]["test_loss"]
    assert data["lora"]["test_loss"] != data["after"]["test_loss"]
    assert [path.name for path in output.parent.glob("*lora*")] == []
    assert 0 <= data["after"]["test_bleu"]["value"] <= 100
    assert "version:" in data["after"]["test_bleu"]["implementation"]
    assert (output / "adapter_model.safetensors").is_file()
    firsts = [line.split()[0] for line in answer.out.splitlines() if line.split()]
    assert firsts.count("facts") == firsts.count("after") == demo.SHOWN


def test_the_comparison_keeps_its_shape_on_a_narrow_terminal(short_demo, call, output, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("demo", "--output_dir", output).out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("┏"))
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    assert {len(line) for line in lines[begin : end + 1]} == {len(lines[end])}
    assert len(lines[end]) < 40
    data = json.loads((output / "demo.json").read_text())
    assert lines[end + 1] == data["after"]["test_bleu"]["implementation"]


def test_a_folder_that_holds_a_run_is_left_alone(short_demo, call, output):
    output.mkdir()
    (output / "settings.json").write_text("{}")
    sentence = call("demo", "--output_dir", output).sentence
    assert f"{output} already holds a run; replace it with `--overwrite`" in sentence
    assert (output / "settings.json").read_text() == "{}"


def test_overwrite_replaces_it(short_demo, call, output):
    claim(output)
    (output / "settings.json").write_text("{}")
    assert call("demo", "--output_dir", output, "--overwrite").code == 0
    assert json.loads((output / "settings.json").read_text())["task"]["value"] == "demo"


def test_a_slow_machine_takes_fewer_steps_and_says_how_long(short_demo, call, output, monkeypatch):
    monkeypatch.setattr(demo, "step_seconds", lambda run: 6.0)
    told = call("demo", "--output_dir", output).out
    assert (
        "about 10 minutes if this machine stays as busy as it is: 8 training steps of 6 s" in told
    )
    assert "8 steps in " in told


@pytest.mark.parametrize(
    ("step_s", "steps", "minutes"),
    [
        (0.05, 96, "a minute"),
        (1.0, 96, "5 minutes"),
        (1.2, 85, "5 minutes"),
        (1.6, 53, "5 minutes"),
        (4.0, 48, "12 minutes"),
    ],
)
def test_five_minutes_are_filled_and_what_takes_longer_is_told(step_s, steps, minutes):
    assert demo.fitting_steps(step_s) == steps
    assert demo.how_long(steps, step_s).startswith(f"about {minutes} if this machine")


@pytest.mark.slow
def test_timing_two_steps_changes_nothing_of_the_training(short_demo, call, output, monkeypatch):
    def losses(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    monkeypatch.setitem(demo.OPTIONS, "logging_steps", 1)
    call("demo", "--output_dir", output / "timed")
    monkeypatch.setattr(demo, "step_seconds", lambda run: 0.1)
    call("demo", "--output_dir", output / "untimed")
    assert losses(output / "timed") == losses(output / "untimed") != []


def test_timing_leaves_no_gradient_no_mode_and_no_random_number(short_demo, tmp_path):
    import torch

    prepared = runs.prepare({**demo.OPTIONS, "max_steps": 8, "output_dir": tmp_path})
    prepared.model.eval()
    state = torch.get_rng_state()
    assert demo.step_seconds(prepared) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not prepared.model.training
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


@pytest.mark.parametrize("steps", [demo.MOST_STEPS, demo.FEWEST_STEPS])
def test_new_ranks_have_time_to_learn_before_the_next_round(steps):
    from loralloc.allocation.schedule import place_rounds
    from loralloc.runs.settings import resolve

    allocation = resolve(demo.OPTIONS).allocation
    places = place_rounds(allocation, steps_per_epoch=125, max_steps=steps).steps
    assert len(places) == 3
    assert all(b - a >= steps * 3 // 8 for a, b in itertools.pairwise(places))


def test_ranks_that_no_round_has_scored_are_not_shown_as_gained(short_demo, call, output):
    told = call("demo", "--output_dir", output).out
    assert "after round 3 of 3" in told
    record = Record.load(output)
    new = sum(record.rounds[-1].added.values())
    total = sum(record.ranks.values())
    assert f"{total - new} now and {new} that no round has scored yet" in told
    births = [birth for births in record.births().values() for birth in births]
    kept = sum(birth in (1, 2) for birth in births)
    given = sum(sum(entry.added.values()) for entry in record.rounds[:2])
    assert f"{kept} of the {given} ranks given before round 3 have outlasted" in told
