"""Checkpoints without pickles."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
from trainers import Interrupted, KillAt, causal_trainer
from transformers import Trainer

from loralloc.training.checkpoint import SafeCheckpoints, read_state, write_state
from loralloc.training.seal import newest_whole, seal


class SafeTrainer(SafeCheckpoints, Trainer):
    pass


def safe_trainer(folder, **changes):
    changes = dict(save_strategy="steps", save_steps=4) | changes
    trainer = causal_trainer(folder, **changes)
    trainer.__class__ = SafeTrainer
    return trainer


def pickles_below(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.fixture
def checkpoint(tmp_path):
    with pytest.raises(Interrupted):
        safe_trainer(tmp_path, callbacks=[KillAt(4)]).train()
    return tmp_path / "checkpoint-4"


def test_no_pickle_is_written(checkpoint, tmp_path):
    assert not pickles_below(tmp_path)
    assert {path.name for path in checkpoint.iterdir()} >= {
        "adapter_model.safetensors",
        "training_state.safetensors",
        "training_state.json",
        "trainer_state.json",
    }


@pytest.mark.parametrize(
    ("optim", "schedule"),
    [
        ("adamw_torch", "cosine"),
        ("adamw_torch_fused", "reduce_lr_on_plateau"),
        ("sgd", "linear"),
        ("rmsprop", "cosine_with_min_lr"),
    ],
)
def test_optimiser_and_schedule_come_back_as_they_were(optim, schedule, tmp_path):
    more = dict(lr_scheduler_kwargs={"min_lr": 1e-4}) if schedule == "cosine_with_min_lr" else {}
    if schedule == "reduce_lr_on_plateau":
        more = dict(eval_strategy="steps", eval_steps=1)
    changes = dict(optim=optim, lr_scheduler_type=schedule, **more)
    first = safe_trainer(tmp_path, callbacks=[KillAt(4)], **changes)
    with pytest.raises(Interrupted):
        first.train()
    second = safe_trainer(tmp_path, callbacks=[KillAt(4)], **changes)
    with pytest.raises(Interrupted):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected, found = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        torch.testing.assert_close(found["state"][index], state, rtol=0, atol=0)
    assert second.lr_scheduler.state_dict() == first.lr_scheduler.state_dict()


def test_the_random_generators_come_back_as_they_were(tmp_path):
    trainer = safe_trainer(tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    tmp_path.joinpath("state").mkdir()
    random.gauss(0, 1), np.random.normal(), torch.randn(3)  # leaves values in waiting
    trainer._save_optimizer_and_scheduler(str(tmp_path / "state"))
    expected = _draw()
    trainer._load_rng_state(str(tmp_path / "state"))
    assert _draw() == expected


def _draw():
    return [random.gauss(0, 1), float(np.random.normal()), *torch.randn(3).tolist()]


def test_a_plain_trainers_checkpoint_is_refused(tmp_path):
    trainer = causal_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()
    with pytest.raises(ValueError, match=r"lacks training_state\.safetensors, so training"):
        safe_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_tensors_that_share_memory_are_kept_one_by_one(tmp_path):
    table = torch.arange(4.0)
    write_state(tmp_path, "state", {"a": table, "b": table, "c": table[2:]})
    found = read_state(tmp_path, "state")
    assert [found[name].tolist() for name in "abc"] == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]


def test_state_that_is_no_plain_data_is_refused(tmp_path):
    trainer = safe_trainer(tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    parameter = trainer.optimizer.param_groups[0]["params"][0]
    trainer.optimizer.state[parameter]["odd"] = {1, 2}
    with pytest.raises(TypeError, match=r"A set at optimizer\.state\.0\.odd cannot be kept"):
        trainer._save_optimizer_and_scheduler(str(tmp_path))


def test_the_state_is_readable_data(checkpoint):
    values = json.loads((checkpoint / "training_state.json").read_text())
    assert values.keys() == {"optimizer", "scheduler", "random"}


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert newest_whole(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        seal(tmp_path / name)
    (tmp_path / "checkpoint-11").mkdir()  # a kill cut it short: the seal is written last
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"


def test_training_is_as_with_the_plain_trainer(tmp_path):
    weights = []
    for build in (causal_trainer, safe_trainer):
        trainer = build(tmp_path, model=tiny.adapted(tiny.llama(), r=2, lora_dropout=0.2))
        trainer.train()
        weights.append(trainer.model.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
