"""A run that diverges says so, saves nothing of it and keeps what was good."""

import pytest
import tiny
import torch
from crossed import crossed
from trainers import causal_trainer
from transformers import TrainerCallback

from loralloc import attach, drive, get_method
from loralloc.allocation.config import AllocationConfig
from loralloc.training.finite import check_finite


class Poison(TrainerCallback):
    """Lets a weight be no number after a step."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            weight = next(p for p in model.parameters() if p.requires_grad)
            with torch.no_grad():
                weight.view(-1)[0] = self.value


METHODS = ["lora", "houlsby", "bitfit", "sora", "p-tuning-v2", "full"]
VALUES = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(("name", "value"), crossed(METHODS, VALUES))
def test_weights_that_are_not_finite_end_the_run(name, value, tmp_path):
    trainer = causal_trainer(
        tmp_path, model=tiny.llama(), callbacks=[Poison(7, value)], save_strategy="steps",
        save_steps=2, logging_steps=100,
    )  # fmt: skip
    drive(trainer, get_method(name)())
    with pytest.raises(FloatingPointError, match="At step 8 the weights that train are not finite"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == "checkpoint-6"


def test_a_learning_rate_beyond_all_bounds_is_no_success(tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.llama(), learning_rate=1e30)
    drive(trainer, get_method("lora")())
    with pytest.raises(FloatingPointError, match="lower the learning rate or check the data"):
        trainer.train()


def test_a_weight_that_is_lost_after_the_last_round_is_told_at_the_end(tmp_path):
    trainer = causal_trainer(tmp_path, callbacks=[Poison(11)], logging_steps=100)
    attach(trainer, AllocationConfig(num_rounds=1, warmup_epochs=0.5, scoring_examples=4))
    with pytest.raises(FloatingPointError, match="At step 12"):
        trainer.train()


def test_finite_weights_pass_however_large():
    model = tiny.adapted(tiny.llama())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.finfo(parameter.dtype).max)
    check_finite(model, step=1)
