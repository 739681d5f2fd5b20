"""Rounds whatever the run computes in, however its steps are made, and whatever goes wrong."""

import pytest
import tiny
import torch
from trainers import adapter, causal_trainer, losses, options, ranks_now, without_seconds
from transformers import TrainerCallback

from loralloc import ScoringError, attach
from loralloc.training.seal import newest_whole

AT = [3, 6, 9]


def steps(allocation):
    return [entry.step for entry in allocation.record.rounds]


def decided(allocation):
    return [(entry.step, entry.pruned, entry.added) for entry in allocation.record.rounds]


def trained(folder, *, model=None, how=None, changes=None):
    model = model or tiny.adapted(tiny.llama(), r=2)
    trainer = causal_trainer(folder, model=model, **(how or {}))
    allocation = attach(trainer, options(**(changes or {})))
    trainer.train()
    return trainer, allocation


class Skipped(TrainerCallback):
    """Lets gradients overflow in the first steps of a run whose loss is scaled, as in fp16."""

    def __init__(self, number):
        self.number, self.weights = number, {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        self.weights[state.global_step] = adapter(model)
        if state.global_step < self.number:
            next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("inf")


class Overflow(TrainerCallback):
    """Lets the loss be no number from the end of a step on, by a frozen weight."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, *, model, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_base_model().lm_head.weight[0, 0] = float("nan")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_are_skipped_do_not_shift_rounds(optim, tmp_path):
    skipped = Skipped(number=4)  # the first round finds an optimiser without state
    trainer = causal_trainer(tmp_path, optim=optim, callbacks=[skipped])
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    allocation = attach(trainer, options())
    trainer.train()
    assert scaler.get_scale() == 2.0**6
    assert_unchanged(skipped.weights[0], skipped.weights[2])
    assert steps(allocation) == AT
    assert sum(ranks_now(trainer.model).values()) == 2 * 14
    after = adapter(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(value.shape == b.shape and not torch.equal(value, b)
               for name, value in after.items()
               if (b := skipped.weights[4].get(name)) is not None)  # fmt: skip


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("score", ["sensitivity", "architecture"])
def test_scores_that_read_gradients_of_training_are_refused_in_fp16(score, tmp_path):
    """A fused optimiser skips a step by itself: infinite gradients would be gathered."""
    trainer = causal_trainer(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(TypeError, match="alora reads gradients between steps; train with bf16"):
        attach(trainer, options(score=score, scoring_examples=32))
    attach(trainer, options())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranks_move_on_weights_in_half_precision(dtype, tmp_path):
    model = tiny.adapted(tiny.llama().to(dtype), r=2)
    trainer, allocation = trained(tmp_path, model=model)
    assert steps(allocation) == AT
    assert len(set(ranks_now(model).values())) > 1
    assert {value.dtype for value in adapter(model).values()} == {torch.float32}
    found = losses(trainer)
    assert found[12] < found[1]


def test_accumulated_and_limited_runs_have_the_rounds_of_a_plain_one(tmp_path):
    plain, allocation = trained(tmp_path / "plain")
    assert steps(allocation) == AT
    for name, how in {
        "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        "limited": dict(max_steps=12, num_train_epochs=9),
    }.items():
        trainer, other = trained(tmp_path / name, how=how)
        assert decided(other) == decided(allocation)
        assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)


def test_after_scores_that_are_no_numbers_the_run_goes_on_from_the_last_good_checkpoint(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    whole, expected = trained(tmp_path / "whole", how=saving)
    trainer = causal_trainer(tmp_path / "run", callbacks=[Overflow(step=6)], **saving)
    allocation = attach(trainer, options())
    with pytest.raises(ScoringError, match="Round 2 at step 6 was refused"):
        trainer.train()
    assert newest_whole(tmp_path / "run").name == "checkpoint-4"
    assert len(allocation.record.rounds) == 1
    again = causal_trainer(tmp_path / "run", **saving)
    resumed = attach(again, options())
    again.train(resume_from_checkpoint=True)
    assert without_seconds(resumed.record.rounds) == without_seconds(expected.record.rounds)
    for name, value in adapter(whole.model).items():
        torch.testing.assert_close(adapter(again.model)[name], value, rtol=0, atol=0)
