"""A run that is killed and resumed ends as one that was never stopped."""

import pytest
import tiny
import torch
from trainers import (
    Interrupted,
    KillAt,
    adapter,
    causal_trainer,
    classification_trainer,
    losses,
    options,
    sft_trainer,
    without_seconds,
)
from transformers import Trainer

from loralloc import attach
from loralloc.allocation.layers import lora_layers
from loralloc.training.checkpoint import SafeCheckpoints
from loralloc.training.seal import seal

pytestmark = pytest.mark.reliability


class SafeTrainer(SafeCheckpoints, Trainer):
    pass


@pytest.fixture(scope="module", params=["causal", "classification", "sft", "no pickles"])
def build(request, llama_folder):
    """A trainer of one kind."""

    def trainer(folder, **changes):
        changes = dict(lr_scheduler_type="cosine") | changes
        if request.param == "sft":
            return sft_trainer(folder, model_folder=llama_folder, **changes)
        if request.param == "classification":
            return classification_trainer(folder, **changes)
        # Dropout draws from the random generators: it shows whether they go on as they were.
        model = tiny.adapted(tiny.llama(), r=2, lora_dropout=0.2)
        trainer = causal_trainer(folder, model=model, **changes)
        if request.param == "no pickles":
            trainer.__class__ = SafeTrainer
        return trainer

    return trainer


@pytest.fixture(scope="module")
def never_stopped(build, tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("whole"))
    return trainer, run(trainer)


def run(trainer, *, resume=None, **changes):
    allocation = attach(trainer, options(**changes))
    trainer.train(resume_from_checkpoint=resume)
    return allocation


def killed(trainer, **how):
    """Run until the trainer's `KillAt`."""
    with pytest.raises(Interrupted):
        run(trainer, **how)


def assert_same(expected, found):
    (whole, allocation), (resumed, resumed_allocation) = expected, found
    assert without_seconds(resumed_allocation.record.rounds) == without_seconds(
        allocation.record.rounds
    )
    weights = adapter(whole.model), adapter(resumed.model)
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.parametrize(
    "step",
    (3, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 6, 11))),
)
def test_a_killed_and_resumed_run_ends_as_one_never_stopped(step, build, never_stopped, tmp_path):
    saving = dict(save_strategy="steps", save_steps=step)
    killed(build(tmp_path, callbacks=[KillAt(step)], **saving))
    resumed = build(tmp_path)
    allocation = run(resumed, resume=tmp_path / f"checkpoint-{step}")
    assert_same(never_stopped, (resumed, allocation))


def test_an_evaluation_after_a_checkpoint_changes_nothing_of_the_run(build, tmp_path):
    """At an epoch's last step the checkpoint comes first, and is all that a resumed run has."""
    evaluating = dict(eval_strategy="epoch", save_strategy="steps", save_steps=6)
    whole = build(tmp_path / "whole", **evaluating)
    expected = (whole, run(whole))
    killed(build(tmp_path, callbacks=[KillAt(8)], **evaluating))
    resumed = build(tmp_path, **evaluating)
    assert_same(expected, (resumed, run(resumed, resume=tmp_path / "checkpoint-6")))


def test_the_newest_whole_checkpoint_is_gone_on_from(build, never_stopped, tmp_path):
    saving = dict(save_strategy="steps", save_steps=3)
    killed(build(tmp_path, callbacks=[KillAt(9)], **saving))
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("")
    resumed = build(tmp_path)
    assert_same(never_stopped, (resumed, run(resumed, resume=True)))


@pytest.mark.slow
def test_a_run_may_be_killed_twice(build, never_stopped, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)  # the first is before any round
    killed(build(tmp_path, callbacks=[KillAt(3)], **saving))
    killed(build(tmp_path, callbacks=[KillAt(8)], **saving), resume=tmp_path / "checkpoint-2")
    resumed = build(tmp_path)
    allocation = run(resumed, resume=tmp_path / "checkpoint-8")
    assert_same(never_stopped, (resumed, allocation))


@pytest.fixture
def checkpoint(tmp_path):
    """A plain trainer's run, killed after the checkpoint of step 4."""
    killed(_plain(tmp_path, callbacks=[KillAt(4)]))
    return tmp_path / "checkpoint-4"


def _plain(tmp_path, **changes):
    return causal_trainer(tmp_path, **dict(save_strategy="steps", save_steps=2) | changes)


def test_a_run_with_the_users_own_optimiser_goes_on_training_every_rank(tmp_path):
    def trainer():
        model = tiny.adapted(tiny.llama(), r=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return _plain(tmp_path, model=model, optimizers=(optimizer, None))

    whole, resumed = trainer(), trainer()
    expected = run(whole, min_rank=1)
    found = run(resumed, resume=tmp_path / "checkpoint-4", min_rank=1)
    assert_same((whole, expected), (resumed, found))


def test_a_checkpoint_without_a_record_is_refused(checkpoint, tmp_path):
    (checkpoint / "allocation.json").unlink()
    seal(checkpoint)
    with pytest.raises(FileNotFoundError, match=r"holds no allocation\.json"):
        run(_plain(tmp_path), resume=checkpoint)


def test_a_checkpoint_whose_record_is_another_runs_is_refused(checkpoint, tmp_path):
    other = tmp_path / "checkpoint-2" / "allocation.json"
    (checkpoint / "allocation.json").write_text(other.read_text())
    seal(checkpoint)
    with pytest.raises(ValueError, match="ranks are not those of the record"):
        run(_plain(tmp_path), resume=checkpoint)


def test_a_checkpoint_without_an_adapter_is_refused(checkpoint, tmp_path):
    (checkpoint / "adapter_model.safetensors").unlink()
    seal(checkpoint)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        run(_plain(tmp_path), resume=checkpoint)


def test_another_schedule_than_the_runs_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="was begun with `num_rounds` of 3, and now it is 2"):
        run(_plain(tmp_path), resume=checkpoint, warmup_epochs=1, num_rounds=2)


def test_resuming_on_other_modules_is_refused(checkpoint, tmp_path):
    model = tiny.adapted(tiny.llama(), r=2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="has a module that this model's adapter lacks"):
        run(_plain(tmp_path, model=model), resume=checkpoint)


def test_resuming_with_another_rank_never_changes_the_scaling(checkpoint, tmp_path):
    model = tiny.adapted(tiny.llama(), r=8, lora_alpha=8)  # the run's scaling is 8 / 2
    try:
        run(_plain(tmp_path, model=model), resume=checkpoint)
    except ValueError:
        return
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {4.0}


def test_the_state_of_new_parameters_is_the_checkpoints(checkpoint, tmp_path):
    resumed = _plain(tmp_path, callbacks=[KillAt(4)])
    killed(resumed, resume=checkpoint)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found = resumed.optimizer.state_dict()["state"]
    assert found.keys() == state.keys()
    for index in state:
        torch.testing.assert_close(found[index], state[index], rtol=0, atol=0)
