"""Shrinking inside a trainer: attached, resumed, saved for stock PEFT."""

import pytest
import tiny
import torch
from peft import PeftModel
from trainers import (
    Interrupted,
    KillAt,
    adapter,
    causal_trainer,
    classification_trainer,
    losses,
    present,
    ranks_now,
    sft_trainer,
)

from loralloc import AllocationConfig, attach, drive, get_method
from loralloc.allocation.record import Record
from loralloc.methods import shrink
from loralloc.methods.shrink import Shrink


def options(**changes) -> AllocationConfig:
    """Rounds after steps 3, 5 and 7 of 12, of which the first only looks."""
    usual = dict(preset="shrink", rounds_at=(3, 5, 7), scoring_examples=4, judging_examples=4)
    return AllocationConfig(**{**usual, **changes})


@pytest.mark.parametrize("kind", ["causal", "classification", "sft"])
def test_an_adapter_that_is_there_shrinks_while_it_trains(kind, tmp_path, llama_folder):
    if kind == "sft":
        trainer = sft_trainer(tmp_path, model_folder=llama_folder)
    else:
        trainer = (causal_trainer if kind == "causal" else classification_trainer)(tmp_path)
    method = attach(trainer, options(tolerance=9.0))
    start = sum(ranks_now(trainer.model).values())
    trainer.train()
    assert isinstance(method, Shrink)
    record = method.record
    assert [entry.step for entry in record.rounds] == [3, 5, 7]
    assert [size.step for size in record.frontier] == [3, 5, 7, 12]
    assert sum(ranks_now(trainer.model).values()) <= 0.5 * start
    assert ranks_now(trainer.model) == present(record.ranks)
    assert len(losses(trainer)) == 12
    logged = [entry for entry in trainer.state.log_history if "held_out_loss" in entry]
    assert [entry["parameters"] for entry in logged] == [s.parameters for s in record.frontier]


def test_what_is_saved_where_a_round_passes_opens_in_stock_peft(tmp_path, monkeypatch):
    taken = iter([False, False, False, True])
    monkeypatch.setattr(shrink, "is_as_good", lambda *_, **__: next(taken))
    monkeypatch.setattr(shrink, "still_falls", lambda *_, **__: False)
    trainer = causal_trainer(tmp_path)
    method = attach(trainer, options(prune_share=0.5))
    trainer.train()
    sizes = method.record.frontier
    assert [size.kept for size in sizes] == [True, False, False, False, True, True]
    assert [bool(entry.pruned) for entry in method.record.rounds] == [False, False, True]
    trainer.save_model(tmp_path / "saved")
    assert Record.load(tmp_path / "saved") == method.record
    opened = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    batch = tiny.causal_batch()
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(opened.eval()(**batch).logits, expected)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("kill_at", [4, 6, 8])
def test_a_run_that_is_killed_goes_on_alike(kill_at, tmp_path):
    saves = dict(save_strategy="steps", save_steps=1)
    whole = causal_trainer(tmp_path / "whole")
    expected = attach(whole, options(prune_share=0.6))
    whole.train()

    killed = causal_trainer(tmp_path / "killed", callbacks=[KillAt(kill_at)], **saves)
    attach(killed, options(prune_share=0.6))
    with pytest.raises(Interrupted):
        killed.train()
    checkpoint = tmp_path / "killed" / f"checkpoint-{kill_at}"
    resumed = causal_trainer(tmp_path / "killed", **saves)
    found = attach(resumed, options(prune_share=0.6))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert found.record.frontier == expected.record.frontier
    assert ranks_now(resumed.model) == ranks_now(whole.model)
    after, before = adapter(resumed.model), adapter(whole.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_options_are_refused_when_it_is_resumed(tmp_path):
    saves = dict(save_strategy="steps", save_steps=4)
    first = causal_trainer(tmp_path, max_steps=4, **saves)
    attach(first, options(rounds_at=(2, 3), tolerance=9.0))
    first.train()
    second = causal_trainer(tmp_path, max_steps=4, **saves)
    attach(second, options(rounds_at=(2, 3), tolerance=8.0))
    with pytest.raises(ValueError, match=r"begun with `tolerance` of 9.0, and now it is 8.0"):
        second.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_one_of_the_size_that_was_found(tmp_path):
    trainer = causal_trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    method = attach(trainer, options(tolerance=9.0))
    trainer.train()
    assert trainer.state.best_global_step >= 7
    assert ranks_now(trainer.model) == present(method.record.ranks)


def test_a_bare_model_is_adapted_and_shrunk(tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.llama())
    method = get_method("shrink")(rank=4, allocation=options(target_parameters=1000))
    drive(trainer, method)
    trainer.train()
    assert 900 < method.num_stored() <= 1000


def test_a_trainer_without_held_out_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `eval_dataset`"):
        attach(causal_trainer(tmp_path, num_eval=0), options())
