"""Scores that are gathered while training (ALoRA-DNAS, ALoRA-Sensi), inside a trainer."""

import json

import pytest
import tiny
import torch
from crossed import crossed
from safetensors.torch import load_file
from trainers import (
    Interrupted,
    KillAt,
    StopAt,
    adapter,
    causal_rows,
    causal_trainer,
    classification_trainer,
    losses,
    options,
    present,
    ranks_now,
    sft_trainer,
    without_seconds,
)

from loralloc import attach
from loralloc.allocation.importance.architecture import Gates
from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.allocation.record import Record
from loralloc.training.drive import STATE_NAME
from loralloc.training.seal import seal

STATE_FILE = f"{STATE_NAME}.safetensors"

every_score = pytest.mark.parametrize("score", ["architecture", "sensitivity"])


def wanted(score, **changes):
    return options(**{"score": score, "gate_lr": 0.05, **changes})


@pytest.fixture
def trainer_of(tmp_path, llama_folder):
    def build(kind="causal", folder=tmp_path, **changes):
        if kind == "sft":
            return sft_trainer(folder, model_folder=llama_folder, **changes)
        return (causal_trainer if kind == "causal" else classification_trainer)(folder, **changes)

    return build


def is_gated(model):
    return any(layer.lora_A["default"]._forward_hooks for layer in lora_layers(model).values())


@pytest.mark.parametrize(
    ("kind", "score"),
    crossed(["causal", "classification", "sft"], ["architecture", "sensitivity"]),
)
def test_rounds_take_place_and_leave_plain_lora(kind, score, trainer_of, tmp_path):
    trainer = trainer_of(kind)
    allocation = attach(trainer, wanted(score))
    start = sum(ranks_now(trainer.model).values())
    trainer.train()
    rounds = allocation.record.rounds
    assert [entry.step for entry in rounds] == [3, 6, 9]
    assert all(sum(entry.ranks_after.values()) == start for entry in rounds)
    assert ranks_now(trainer.model) == present(allocation.record.ranks)
    assert list(losses(trainer)) == list(range(1, 13))
    assert not is_gated(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / STATE_FILE).exists()
    saved = Record.load(tmp_path / "final")
    assert saved.rounds == rounds and saved.config["score"] == score
    entry = json.loads((tmp_path / "final" / "allocation.json").read_text())["rounds"][0]
    assert entry["s_full"] is entry["s_base"] is None


@every_score
def test_new_ranks_train(score, trainer_of):
    trainer = trainer_of()
    allocation = attach(trainer, wanted(score, num_rounds=2))
    trainer.train()
    layers = lora_layers(trainer.model)
    last = allocation.record.rounds[-1]
    new_columns = [weight_b(layers[name])[:, -count:] for name, count in last.added.items()]
    assert new_columns
    assert all(bool((columns != 0).any(dim=0).all()) for columns in new_columns)


@every_score
def test_no_development_set_is_needed(score, trainer_of):
    trainer = trainer_of(num_eval=0)
    allocation = attach(trainer, wanted(score))
    trainer.train()
    assert len(allocation.record.rounds) == 3


@every_score
def test_a_scoring_dataset_is_refused(score, trainer_of):
    with pytest.raises(ValueError, match="a `scoring_dataset` would have no effect"):
        attach(trainer_of(), wanted(score), scoring_dataset=causal_rows(8))


@every_score
def test_with_accumulation_every_optimiser_step_counts_once(score, trainer_of, monkeypatch):
    seen = []
    monkeypatch.setattr(Gates, "_update", lambda self, gradient: seen.append(gradient))
    trainer = trainer_of(gradient_accumulation_steps=2, num_train_epochs=4)
    allocation = attach(trainer, wanted(score, num_rounds=2, warmup_epochs=1, recovery_epochs=1))
    if score == "architecture":
        with pytest.raises(RuntimeError, match="have learned from no batch"):
            trainer.train()
        assert len(seen) == 3
        return
    trainer.train()
    assert [entry.step for entry in allocation.record.rounds] == [3, 6]


# ALoRA-Sensi.


def test_sensitivity_trains_as_plain_lora_until_the_first_round(trainer_of):
    allocated, plain = trainer_of(), trainer_of()
    attach(allocated, wanted("sensitivity", num_rounds=1, warmup_epochs=1.5))
    allocated.train()
    plain.train()
    assert [losses(allocated)[n] for n in range(1, 10)] == [losses(plain)[n] for n in range(1, 10)]


def test_sensitivity_is_that_of_clipped_gradients_after_the_step(trainer_of):
    from reference.variants import sensitivity, snapshot
    from transformers import TrainerCallback

    steps = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            steps.append(snapshot(model))

    trainer = trainer_of(max_grad_norm=0.01, callbacks=[Look()])
    allocation = attach(trainer, wanted("sensitivity", num_rounds=1))
    trainer.train()
    norm = sum(float(t.square().sum()) for of in steps[0].values() for t in of[2:]) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)
    for term, expected in sensitivity(steps[:3]).items():
        for name, values in allocation.record.rounds[0].terms[term].items():
            assert values == pytest.approx(expected[name].tolist(), rel=1e-3, abs=1e-12)


# ALoRA-DNAS.


def test_until_the_last_round_weights_see_one_half_and_gates_the_other(trainer_of, monkeypatch):
    trainer = trainer_of()
    rows = {tuple(row["input_ids"]): n for n, row in enumerate(trainer.train_dataset)}
    seen = {"weights": [], "gates": []}

    def note(who, batch):
        seen[who].append([rows[tuple(tokens)] for tokens in batch["input_ids"].tolist()])

    own_step, own_learn = trainer.training_step, Gates.learn

    def training_step(model, inputs, *args):
        note("weights", inputs)
        return own_step(model, inputs, *args)

    def learn(self, batches):
        batches = list(batches)
        assert all(module.training for module in trainer.model.modules())
        for batch in batches:
            note("gates", batch)
        own_learn(self, batches)

    trainer.training_step = training_step
    monkeypatch.setattr(Gates, "learn", learn)
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    attach(trainer, wanted("architecture"))
    trainer.train()
    assert (len(seen["weights"]), len(seen["gates"])) == (12, 9)
    of_gates = {row for batch in seen["gates"] for row in batch}
    of_weights = {row for batch in seen["weights"][:9] for row in batch}
    assert len(of_gates) == len(of_weights) == 12 and not of_gates & of_weights
    assert {row for batch in seen["weights"][9:] for row in batch} & of_gates


def test_between_rounds_evaluation_is_with_the_gates(trainer_of):
    trainer = trainer_of(eval_strategy="steps", eval_steps=1, max_steps=5)
    allocation = attach(trainer, wanted("architecture", num_rounds=1, gate_lr=1.0))
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    # After the round gates are in B, and only what was pruned is gone.
    assert evaluated[3] == pytest.approx(evaluated[4], rel=0.5)
    assert len(allocation.record.rounds) == 1


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_ends_between_rounds_is_saved_with_its_gates_in_it(best, trainer_of, tmp_path):
    metrics = iter([9, 9, 0, 2, 1])  # the best after the round is not the last
    keep_best = dict(
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, metric_for_best_model="scripted", greater_is_better=True,
        compute_metrics=lambda _: {"scripted": float(next(metrics))},
    )  # fmt: skip
    trainer = trainer_of(callbacks=[StopAt(5)], **(keep_best if best else {}))
    attach(trainer, wanted("architecture", gate_lr=1.0))
    measured = []
    own = trainer.callback_handler.on_train_end

    def measure(*args, **kwargs):
        measured.append(logits_of(trainer.model))
        return own(*args, **kwargs)

    trainer.callback_handler.on_train_end = measure
    trainer.train()
    if best:
        assert trainer.state.best_global_step == 4
        now, folder = ranks_now(trainer.model), tmp_path / "checkpoint-4"
        gates = 2 * torch.sigmoid(load_file(folder / STATE_FILE)["gathered.logits"])
        assert float((gates - 1).abs().max()) > 0.1
        plain, found = load_file(folder / "adapter_model.safetensors"), adapter(trainer.model)
        for name, gate in zip(now, gates.split(list(now.values())), strict=True):
            key = f"base_model.model.{name}.lora_B.weight"
            torch.testing.assert_close(found[key], plain[key] * gate)
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / STATE_FILE).exists()
    torch.testing.assert_close(logits_of(trainer.model), measured[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits_of(model):
    model.eval()
    return model(**tiny.causal_batch(seed=7)).logits


def test_gradient_checkpointing(trainer_of):
    ranks = []
    for checkpointing in (False, True):
        trainer = trainer_of(gradient_checkpointing=checkpointing)
        allocation = attach(trainer, wanted("architecture", num_rounds=1))
        trainer.train()
        ranks.append(allocation.record.ranks)
    assert ranks[0] == ranks[1]


def test_reentrant_checkpointing_is_refused_and_the_trainer_left_as_it_was(trainer_of):
    trainer = trainer_of()
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ValueError, match="`use_reentrant`, under which PyTorch gives no gradient"):
        attach(trainer, wanted("architecture"))
    assert "_get_train_sampler" not in vars(trainer)
    assert not is_gated(trainer.model)


def test_a_schedule_that_changes_after_attach_is_refused(trainer_of):
    trainer = trainer_of()
    attach(trainer, wanted("architecture"))
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match=r"change the trainer's arguments before attach\(\)"):
        trainer.train()


# Resumed.


def run(trainer, score, resume=None, **changes):
    allocation = attach(trainer, wanted(score, **changes))
    if any(isinstance(c, KillAt) for c in trainer.callback_handler.callbacks):
        with pytest.raises(Interrupted):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    return allocation


@pytest.mark.slow
@every_score
@pytest.mark.parametrize("step", [2, 3, 7])
@pytest.mark.reliability
def test_a_killed_and_resumed_run_ends_as_one_never_stopped(score, step, trainer_of, tmp_path):
    def trainer(folder, **changes):
        # Dropout shows whether the random generators go on as they were, for the gates too.
        model = tiny.adapted(tiny.llama(), r=2, lora_dropout=0.2)
        return trainer_of(
            folder=folder, model=model, eval_strategy="steps", eval_steps=2, **changes
        )

    whole = trainer(tmp_path / "whole")
    expected = run(whole, score)
    saving = dict(save_strategy="steps", save_steps=step)
    run(trainer(tmp_path, callbacks=[KillAt(step)], **saving), score)
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert (checkpoint / STATE_FILE).exists()
    resumed = trainer(tmp_path)
    found = run(resumed, score, resume=checkpoint)
    assert without_seconds(found.record.rounds) == without_seconds(expected.record.rounds)
    torch.testing.assert_close(adapter(resumed.model), adapter(whole.model), rtol=0, atol=1e-6)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


@pytest.fixture
def checkpoint_of(trainer_of, tmp_path):
    def killed(score):
        run(trainer_of(save_strategy="steps", save_steps=4, callbacks=[KillAt(4)]), score)
        return tmp_path / "checkpoint-4"

    return killed


@every_score
def test_a_checkpoint_without_what_was_gathered_is_refused(score, checkpoint_of, trainer_of):
    checkpoint = checkpoint_of(score)
    (checkpoint / STATE_FILE).unlink()
    seal(checkpoint)
    with pytest.raises(ValueError, match=f"lacks {STATE_FILE}, so training cannot go on"):
        run(trainer_of(), score, resume=checkpoint)


@every_score
def test_resuming_with_another_score_is_refused(score, checkpoint_of, trainer_of):
    checkpoint = checkpoint_of(score)
    for other in {"architecture", "sensitivity", "gradient"} - {score}:
        with pytest.raises(ValueError, match=f"was begun with `score` of '{score}', and now"):
            run(trainer_of(), other, resume=checkpoint)
