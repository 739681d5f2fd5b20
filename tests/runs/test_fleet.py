"""Runs that are trained at once end as the same runs one by one."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from trainers import Interrupted, KillAt

from loralloc.runs import run as runs
from loralloc.runs.fleet import FleetRuns, check_model
from loralloc.training.fleet import Fleet

COMMON = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "dtype": "float32",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
HEAD = "base_model.model.classifier.modules_to_save.default.weight"
ROUNDS = {"rounds_at": [2, 4], "scoring_examples": 4}
MEMBERS = (
    {"method": "lora", "lora_r": 2, "learning_rate": 1e-2, "seed": 0},
    {"method": "rslora", "lora_r": 5, "lora_alpha": 10, "learning_rate": 4e-3, "seed": 1},
    {"method": "alora", "lora_r": 2, "learning_rate": 1e-2, "seed": 2, **ROUNDS},
    {"method": "alora-sensi", "lora_r": 3, "seed": 1, "rounds_at": [2, 4]},
)


def rows(count):
    return [
        {"prompt": f"the film {number} is" + " very" * (number % 5), "completion": f" {word}"}
        for number, word in zip(range(count), ("good", "bad and cold") * count, strict=False)
    ]


def labelled(count):
    words = ("good and warm", "bad", "cold")
    return [{"text": f"the film is {words[n % 3]}", "label": n % 3} for n in range(count)]


@pytest.fixture
def data(tmp_path, write_rows):
    def write(make):
        write_rows(tmp_path / "data" / "train.jsonl", make(22))
        write_rows(tmp_path / "data" / "validation.jsonl", make(9))
        return tmp_path / "data"

    return write


def one_by_one(members):
    for options in members:
        runs.train(runs.prepare(options))


def at_once(members, **how):
    fleet = FleetRuns()
    for options in members:
        fleet.add(options, **how)
    return fleet, fleet.train()


def entries(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not is_a_time(name)}
        for line in lines
    ]


def is_a_time(name):
    return "runtime" in name or "per_second" in name or name == "round_seconds"


def assert_same(folder, other, *, but=(), atol=1e-5):
    ours, theirs = (
        [{k: v for k, v in entry.items() if k not in but} for entry in entries(where)]
        for where in (folder, other)
    )
    assert len(ours) == len(theirs) > 2
    for entry, expected in zip(ours, theirs, strict=True):
        assert entry == pytest.approx(expected, abs=atol, rel=1e-4)
    losses = [(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a if "loss" in k]
    assert max(abs(a - b) for a, b in losses) < atol
    weights = [load_file(where / "adapter_model.safetensors") for where in (folder, other)]
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def placed(members, folder, common):
    return [
        {**COMMON, **common, **member, "output_dir": folder / str(number)}
        for number, member in enumerate(members)
    ]


def test_a_fleet_of_four_is_four_runs(data, tmp_path, llama_folder, monkeypatch):
    common = {"dataset_name": data(rows), "model_name_or_path": llama_folder}
    one_by_one(placed(MEMBERS, tmp_path / "alone", common))
    sizes = []
    own = Fleet._forward
    monkeypatch.setattr(Fleet, "_forward", lambda self, g: (sizes.append(len(g)), own(self, g))[1])
    fleet, errors = at_once(placed(MEMBERS, tmp_path / "fleet", common))
    assert errors == [None] * 4
    assert set(sizes) == {4}  # steps and evaluations, none alone
    assert [len(run.allocation.record.rounds) for run in fleet.runs[2:]] == [2, 2]
    weights = [run.model.get_base_model().model.embed_tokens.weight for run in fleet.runs]
    assert all(weight is weights[0] for weight in weights)
    for number in range(4):
        assert_same(tmp_path / "fleet" / str(number), tmp_path / "alone" / str(number))


def test_heads_train_with_the_run_they_belong_to(data, tmp_path, bert_folder):
    common = {
        "dataset_name": data(labelled),
        "model_name_or_path": bert_folder,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    members = (
        {**MEMBERS[0], "method": "lora-plus"},
        {**MEMBERS[2], "method": "random", "rounds_at": [2]},
    )
    one_by_one(placed(members, tmp_path / "alone", common))
    fleet, errors = at_once(placed(members, tmp_path / "fleet", common))
    assert errors == [None, None]
    first, second = (run.model.get_parameter(HEAD) for run in fleet.runs)
    assert not torch.equal(first, second)
    for number in range(2):
        assert_same(tmp_path / "fleet" / str(number), tmp_path / "alone" / str(number))


@pytest.fixture
def common(data, llama_folder):
    return {"dataset_name": data(rows), "model_name_or_path": llama_folder, "max_steps": 4}


@pytest.mark.slow
@pytest.mark.reliability
def test_a_killed_fleet_goes_on_from_each_runs_checkpoint(common, tmp_path):
    common |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    common |= {"gradient_accumulation_steps": 2}
    members = (MEMBERS[1], {**MEMBERS[0], "method": "alora", "rounds_at": [2, 3]})
    whole = placed(members, tmp_path / "whole", common)
    assert at_once(whole)[1] == [None, None]
    again = placed(members, tmp_path / "again", common)
    fleet = FleetRuns()
    for options, step in zip(again, (2, 3), strict=True):
        fleet.add(options).trainer.add_callback(KillAt(step))
    assert [type(error) for error in fleet.train()] == [Interrupted, Interrupted]
    assert at_once(again, resume=True)[1] == [None, None]
    for number in range(2):
        found, expected = tmp_path / "again" / str(number), tmp_path / "whole" / str(number)
        # Counted and averaged from the step that a run is resumed at.
        assert_same(found, expected, but=["num_tokens", "train_loss"])


def test_a_run_that_fails_ends_alone(common, tmp_path):
    fleet = FleetRuns()
    first, second = (fleet.add(options) for options in placed(MEMBERS[:2], tmp_path, common))
    first.trainer.add_callback(KillAt(2))
    error, none = fleet.train()
    assert isinstance(error, Interrupted)
    assert none is None
    assert second.trainer.state.global_step == 4
    assert (tmp_path / "1" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "0" / "adapter_model.safetensors").exists()
    assert "forward" not in vars(second.model.get_base_model().model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sora"}, r"`method` is 'sora', and a fleet trains lora, rslora, lora-plus, al"),
        ({"method": "alora", "score": "architecture"}, "`score` is 'architecture', which is gath"),
        ({"method": "alora-dnas"}, "`method` is 'alora-dnas'"),
        ({"lora_dropout": 0.1}, "`dropout` is 0.1, and in a fleet what it drops would be drawn"),
        ({"method.use_dora": True}, "`use_dora` is True"),
        ({"gradient_checkpointing": True}, "`gradient_checkpointing` is True"),
        (
            {"cuda_graphs": True},
            "`cuda_graphs` is True, and in a fleet it changes the run's own mo",
        ),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0"),
        ({"model_init_kwargs": {"attention_dropout": 0.1}}, "has dropout .*`model_init_kwargs`"),
    ],
)
def test_what_cannot_be_held_equal_is_refused(options, words, common, tmp_path):
    fleet = FleetRuns()
    with pytest.raises(ValueError, match=words):
        fleet.add({**COMMON, **common, "output_dir": tmp_path / "out", "method": "lora", **options})
    assert not fleet.runs
    assert not (tmp_path / "out").exists()


def test_an_adapter_outside_of_the_body_is_refused():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="The adapter is on lm_head, which is no part of the back"):
        check_model(model)


def test_runs_of_another_length_do_not_go_along(common, tmp_path):
    fleet = FleetRuns()
    one, other = placed(MEMBERS[:2], tmp_path, common)
    fleet.add(one)
    with pytest.raises(ValueError, match="`max_steps` is 5 in one run of a fleet and 4 in another"):
        fleet.add({**other, "max_steps": 5})
