"""`load_best_model_at_end` and early stopping, while ranks change between checkpoints."""

import pytest
import torch
from safetensors.torch import load_file
from trainers import (
    StopAt,
    adapter,
    causal_trainer,
    classification_trainer,
    following,
    options,
    present,
    ranks_now,
)
from transformers import EarlyStoppingCallback

from loralloc import attach
from loralloc.methods.restore import saved_ranks


@pytest.fixture(params=["causal", "classification"])
def trainer_of(request, tmp_path):
    """A trainer that evaluates and saves every step, with a metric that follows a script."""
    build = causal_trainer if request.param == "causal" else classification_trainer

    def trainer(metrics, **changes):
        values = iter(metrics)
        return build(
            tmp_path,
            **following(values),
            **changes,
        )

    return trainer


def best_step(trainer):
    return int(trainer.state.best_model_checkpoint.rpartition("-")[2])


def weights_are_those_of(trainer):
    saved = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    now = adapter(trainer.model)
    return saved.keys() == now.keys() and all(torch.equal(saved[key], now[key]) for key in saved)


def test_the_best_checkpoint_after_the_last_round_is_loaded(trainer_of):
    # The best of all is before the last round, at step 9: the ranks were others then.
    trainer = trainer_of([0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 2, 1])
    allocation = attach(trainer, options())
    trainer.train()
    assert best_step(trainer) == 10
    assert weights_are_those_of(trainer)
    assert ranks_now(trainer.model) == present(allocation.record.ranks)


def test_the_checkpoint_of_the_last_rounds_own_step_may_be_the_best(trainer_of):
    trainer = trainer_of([9, 9, 9, 9, 9, 9, 9, 9, 5, 3, 2, 1])
    attach(trainer, options())
    trainer.train()
    assert best_step(trainer) == 9
    assert weights_are_those_of(trainer)


@pytest.mark.parametrize("order", ("before attach", "after attach"))
def test_early_stopping_waits_for_the_last_round(order, trainer_of):
    trainer = trainer_of(range(12, 0, -1))  # worse at every step
    if order == "before attach":
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    allocation = attach(trainer, options())
    if order == "after attach":
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert len(allocation.record.rounds) == 3
    assert trainer.state.global_step == 10
    assert best_step(trainer) == 9


def test_patience_is_counted_from_the_last_round(trainer_of):
    trainer = trainer_of(range(20, 0, -1), callbacks=[EarlyStoppingCallback(2)])
    attach(trainer, options(num_rounds=2))
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_run_that_is_stopped_between_rounds_still_ends_well(trainer_of):
    trainer = trainer_of([0, 0, 0, 9, 0, 0, 0, 0], callbacks=[StopAt(8)])
    allocation = attach(trainer, options())
    trainer.train()
    assert ranks_now(trainer.model) == present(allocation.record.ranks)


def test_a_checkpoint_holds_the_ranks_of_its_step(trainer_of, tmp_path):
    trainer = trainer_of(range(12))
    allocation = attach(trainer, options())
    trainer.train()
    first, second, _ = allocation.record.rounds
    assert saved_ranks(tmp_path / "checkpoint-2") == first.ranks_before
    assert saved_ranks(tmp_path / "checkpoint-3") == present(first.ranks_after)
    assert saved_ranks(tmp_path / "checkpoint-5") == present(second.ranks_before)
    assert saved_ranks(tmp_path / "checkpoint-6") == present(second.ranks_after)
