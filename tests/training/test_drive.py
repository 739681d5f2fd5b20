"""A method inside a real `Trainer`: its losses, its steps, its checkpoints, its resuming."""

from dataclasses import dataclass

import given
import pytest
import tiny
import torch
from peft import TaskType
from safetensors.torch import load_file
from trainers import Interrupted, KillAt, StopAt, causal_trainer, following, losses
from transformers import EarlyStoppingCallback, Trainer

from loralloc.methods.catalog import METHODS, get_method
from loralloc.methods.lora import Lora
from loralloc.training.checkpoint import SafeCheckpoints
from loralloc.training.drive import drive

STEPS = 12
"""Of a run of two epochs with 6 steps each."""


class SafeTrainer(SafeCheckpoints, Trainer):
    pass


def prepared(method, budget=3000):
    model = tiny.llama()
    with tiny.seeded(4):
        method.fit(model, budget)
        method.prepare(model, task_type=TaskType.CAUSAL_LM)
    return method


def driven(folder, method, *, kind=SafeTrainer, **changes):
    trainer = causal_trainer(folder, model=prepared(method).model, **changes)
    trainer.__class__ = kind
    drive(trainer, method)
    return trainer


@dataclass(kw_only=True)
class Probe(Lora):
    """Plain LoRA that remembers what it was told, and adds a loss of its own."""

    eligible: int = 0
    weight: float = 0.0
    fails: bool = False

    def begin(self, session):
        self.session, self.steps, self.seen = session, [], []

    def watch(self, batch):
        if hasattr(self, "seen"):
            self.seen.append("labels" in batch)

    def extra_loss(self):
        weights = [p for p in self.model.parameters() if p.requires_grad]
        return self.weight * sum((w**2).sum() for w in weights) if self.weight else None

    def step(self, number):
        has_gradients = any(p.grad is not None for p in self.model.parameters())
        self.steps.append((number, has_gradients))

    def first_eligible_step(self):
        return self.eligible

    def finish(self):
        if self.fails:
            raise RuntimeError("The budget was never reached; train longer.")


def test_a_method_sees_every_batch_and_every_step_while_gradients_are_there(tmp_path):
    method = Probe()
    trainer = driven(tmp_path, method, gradient_accumulation_steps=2)
    trainer.train()
    num_steps = trainer.state.global_step
    assert method.steps == [(number, True) for number in range(1, num_steps + 1)]
    assert len(method.seen) == 2 * num_steps
    assert all(method.seen)
    assert method.session.num_steps == num_steps
    assert method.session.optimizer.param_groups


def test_a_method_sees_the_batches_of_an_evaluation_and_adds_no_loss_to_them(tmp_path):
    evaluated = {}
    for weight in (0.0, 10.0):
        method = Probe(weight=weight)
        trainer = driven(tmp_path, method, max_steps=1, learning_rate=0.0)
        trainer.train()
        before = len(method.seen)
        evaluated[weight] = trainer.evaluate()["eval_loss"]
        assert len(method.seen) > before
    assert evaluated[0.0] == evaluated[10.0]


class MeanOfABatch(SafeTrainer):
    """As Transformers has it of a `compute_loss` that leaves the step's count of items out."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("kind", [SafeTrainer, MeanOfABatch])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_extra_loss_counts_once_a_step_however_it_is_accumulated(accumulation, kind, tmp_path):
    plain, extra = Probe(), Probe(weight=0.5)
    logged = []
    for method in (plain, extra):
        trainer = driven(
            tmp_path,
            method,
            kind=kind,
            max_steps=1,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
        )
        method.weights_before = float(sum((p**2).sum() for p in _trained(method)))
        trainer.train()
        logged.append(losses(trainer)[1])
    expected = 0.5 * extra.weights_before
    assert logged[1] - logged[0] == pytest.approx(expected, rel=1e-3)


def _trained(method):
    return [p.detach() for p in method.model.parameters() if p.requires_grad]


def test_only_checkpoints_from_the_first_eligible_step_on_may_be_the_best(tmp_path):
    scripted = iter([9, 9, 9, 9, 9, 1, 2, 5, 3, 2, 1, 0])
    method = Probe(eligible=6)
    trainer = driven(
        tmp_path,
        method,
        **following(scripted),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("-8")
    saved = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    method.save(tmp_path / "end")
    now = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], now[name]) for name in saved)


def test_early_stopping_waits_for_the_first_eligible_step(tmp_path):
    falling = iter(range(STEPS, 0, -1))
    trainer = driven(
        tmp_path,
        Probe(eligible=5),
        **following(falling),
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 7


def test_a_method_that_did_not_do_what_it_is_for_says_so(tmp_path):
    trainer = driven(tmp_path, Probe(fails=True), callbacks=[StopAt(2)])
    with pytest.raises(RuntimeError, match="never reached"):
        trainer.train()


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    method = prepared(Probe())
    trainer = causal_trainer(tmp_path, model=method.model)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(TypeError, match=r"2 GPUs and one process.*where lora does not reach"):
        drive(trainer, method)


def test_a_method_that_acts_between_steps_is_refused_where_the_loss_is_scaled(tmp_path):
    method = prepared(Probe())
    trainer = causal_trainer(tmp_path, model=method.model)
    trainer.args.fp16 = True
    with pytest.raises(TypeError, match="lora reads gradients between steps; train with bf16"):
        drive(trainer, method)
    drive(trainer, prepared(Lora()))


@dataclass(kw_only=True)
class Searching(Probe):
    def search_steps(self, num_steps):
        return num_steps // 4


def test_after_a_search_the_learning_rate_begins_anew(tmp_path):
    trainer = driven(tmp_path, Searching(), warmup_steps=2, learning_rate=1.0)
    trainer.train()
    log = trainer.state.log_history
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    # Two steps of warm-up and linear decay, over 3 steps and then over the run's 12.
    decay = [(10 - i) / 10 for i in range(10)]
    assert rates == pytest.approx([0, 0.5, 1, 0, 0.5, *decay])


def test_the_steps_of_a_search_come_on_top_of_the_trainers_own(tmp_path):
    method = Searching()
    trainer = driven(tmp_path, method)
    before = trainer.args.max_steps
    trainer.train()
    assert trainer.state.global_step == STEPS + 3
    assert (method.session.num_steps, method.session.search_steps) == (STEPS + 3, 3)
    assert trainer.args.max_steps == before
    trainer.args.num_train_epochs = 4
    with pytest.raises(ValueError, match="The run has 24 steps now and had 12 when half"):
        trainer.train()


def test_a_schedule_that_cannot_begin_anew_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot begin anew where a search ends"):
        driven(
            tmp_path,
            Searching(),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="epoch",
        )


def test_a_search_is_given_the_other_half_and_held_out_examples(tmp_path):
    method = Searching()
    trainer = driven(tmp_path, method)
    trainer.train()
    session = method.session
    assert len(session.objective.batches[0]["labels"]) > 0
    loss = session.loss(next(session.second_half))
    assert loss.requires_grad
    plain = Probe()
    driven(tmp_path, plain).train()
    assert next(plain.session.second_half, None) is None


ALIKE = {"random", "inverse", "mlp-only", "attention-only", "pattern", "dora", "rslora"}
"""Methods that are saved and resumed by the code of another."""


ONCE = {
    *("prune", "truncate", "eva", "gora", "elalora", "l1ra", "increlora", "igu-lora"),
    *("lora-plus", "pissa"),
}
"""Methods without a search, for which one kill in the midst of what they do is enough."""

IN_EVERY_RUN = {("alora", 9), ("sora", 9), ("lst", 9)}
"""Kills that every run of the tests makes: rounds, gates, a method not of PEFT."""

KILLS = [
    pytest.param(name, at, marks=[] if (name, at) in IN_EVERY_RUN else [pytest.mark.slow])
    for name in METHODS
    if name not in ALIKE
    for at in ((9,) if name in ONCE else (3, 9))
]


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "at"), KILLS)
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(name, at, tmp_path):
    ends = {}
    for folder in ("whole", "killed"):
        # Of 24 steps a quarter is searched in: one kill comes in the search, one after it.
        options = dict(save_strategy="steps", save_steps=3, save_total_limit=1, num_train_epochs=4)
        method = get_method(name)(**given.options(name))
        trainer = driven(tmp_path / folder, method, **options)
        if folder == "killed":
            trainer.add_callback(KillAt(at))
            with pytest.raises(Interrupted):
                trainer.train()
            method = get_method(name)(**given.options(name))
            trainer = driven(tmp_path / folder, method, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / f"checkpoint-{at}"))
        else:
            trainer.train()
        method.save(tmp_path / folder / "end")
        ends[folder] = load_file(tmp_path / folder / "end" / "adapter_model.safetensors")
    assert ends["whole"].keys() == ends["killed"].keys()
    for key, tensor in ends["whole"].items():
        torch.testing.assert_close(ends["killed"][key], tensor, atol=1e-5, rtol=1e-4)


def test_a_method_gives_the_optimiser_its_groups_before_the_schedule_is_made(tmp_path):
    method = get_method("lora-plus")(rank=2, ratio=8.0)
    trainer = driven(tmp_path, method)
    trainer.train()
    rate, groups = trainer.args.learning_rate, trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {rate, 8 * rate}
    assert trainer.lr_scheduler.base_lrs == [group["initial_lr"] for group in groups]
    assert "create_optimizer" not in vars(trainer)
