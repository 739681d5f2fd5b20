import dataclasses
import json
import statistics

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
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
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from loralloc import (
    AllocationConfig,
    Scores,
    ScoringError,
    attach,
    detach,
    drive,
    get_method,
    plan,
)
from loralloc.allocation.layers import lora_layers, weight_b
from loralloc.allocation.record import Record

PLACES = dict(
    num_rounds=AllocationConfig.num_rounds,
    warmup_epochs=AllocationConfig.warmup_epochs,
    recovery_epochs=AllocationConfig.recovery_epochs,
)
"""What `rounds_at` stands in the place of, left out."""

KINDS = ("causal", "classification", "sft")


@pytest.fixture
def trainer_of(tmp_path, llama_folder):
    def build(kind, **changes):
        if kind == "sft":
            return sft_trainer(tmp_path, model_folder=llama_folder, **changes)
        return (causal_trainer if kind == "causal" else classification_trainer)(tmp_path, **changes)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_take_place_at_the_scheduled_steps_and_keep_the_total(kind, trainer_of):
    trainer = trainer_of(kind)
    allocation = attach(trainer, options())
    start = sum(ranks_now(trainer.model).values())
    trainer.train()
    rounds = allocation.record.rounds
    assert allocation.steps == [entry.step for entry in rounds] == [3, 6, 9]
    assert all(sum(entry.ranks_after.values()) == start for entry in rounds)
    assert ranks_now(trainer.model) == present(allocation.record.ranks)
    assert any(allocation.record.ranks[name] != 2 for name in allocation.record.ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_is_logged_and_reported(kind, trainer_of):
    reported = []
    trainer = trainer_of(kind)
    allocation = attach(trainer, options(), on_round=reported.append)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "round" in entry]
    assert [(entry["round"], entry["step"]) for entry in entries] == [(1, 3), (2, 6), (3, 9)]
    assert all(entry["ranks_pruned"] == allocation.num_pruned for entry in entries)
    assert "churn" not in entries[0] and 0 <= entries[1]["churn"] <= 1
    assert reported == allocation.record.rounds


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_reports_to_is_given_ranks_and_scores_of_every_round(kind, trainer_of):
    class Reporter(TrainerCallback):
        """As those of TensorBoard and W&B, which take numbers by name."""

        def on_log(self, args, state, control, logs, **_):
            entries.append(dict(logs))

    entries = []
    trainer = trainer_of(kind)
    trainer.add_callback(Reporter())
    allocation = attach(trainer, options())
    trainer.train()
    told = [entry for entry in entries if "round" in entry]
    for entry, of in zip(told, allocation.record.rounds, strict=True):
        assert all(type(value) in (int, float) for value in entry.values())
        by_kind = {name: n for name, n in entry.items() if name.startswith("ranks/")}
        assert sum(by_kind.values()) == sum(of.ranks_after.values())
        assert 2 * len(by_kind) == len(of.ranks_after)  # the models have two blocks
        assert entry["scores/loss"] == -of.s_full
        assert entry["scores/loss_without_adapter"] == -of.s_base
        for term in ("without", "only"):
            values = sorted(x for xs in of.terms[term].values() for x in xs)
            low, median, high = (entry[f"scores/{term}_{n}"] for n in ("low", "median", "high"))
            assert values[0] <= low <= median <= high <= values[-1]
            assert median == pytest.approx(statistics.median(values), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_every_step_is_logged_also_where_a_round_takes_place(kind, trainer_of):
    trainer = trainer_of(kind)
    attach(trainer, options())
    trainer.train()
    assert list(losses(trainer)) == list(range(1, 13))


@pytest.mark.parametrize("kind", KINDS)
def test_new_ranks_train(kind, trainer_of):
    trainer = trainer_of(kind)
    allocation = attach(trainer, options(num_rounds=1))
    trainer.train()
    (entry,) = allocation.record.rounds
    layers = lora_layers(trainer.model)
    new_columns = [weight_b(layers[name])[:, -count:] for name, count in entry.added.items()]
    assert new_columns
    assert all(bool((columns != 0).any(dim=0).all()) for columns in new_columns)


def test_only_the_adapter_changes(trainer_of):
    trainer = trainer_of("causal")
    before = {
        name: parameter.clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    attach(trainer, options())
    trainer.train()
    after = dict(trainer.model.named_parameters())
    # An emptied module gives its place back to the layer it wrapped.
    after |= {name.replace(".weight", ".base_layer.weight"): p for name, p in after.items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_saved_record_is_the_callbacks(trainer_of, tmp_path):
    trainer = trainer_of("causal", save_strategy="steps", save_steps=7)
    allocation = attach(trainer, options())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert Record.load(tmp_path / "final").rounds == allocation.record.rounds
    assert [entry.step for entry in Record.load(tmp_path / "checkpoint-7").rounds] == [3, 6]
    data = json.loads((tmp_path / "final" / "allocation.json").read_text())
    assert data["config"]["seed"] == trainer.args.seed


def test_before_the_first_round_training_is_plain_lora(trainer_of):
    allocated, plain = trainer_of("causal"), trainer_of("causal")
    attach(allocated, options(num_rounds=1, warmup_epochs=1.5))
    allocated.train()
    plain.train()
    with_rounds, without = losses(allocated), losses(plain)
    assert [with_rounds[step] for step in range(1, 9)] == [without[step] for step in range(1, 9)]
    assert with_rounds[12] != without[12]


@pytest.mark.parametrize("score", ["norm", "gradient", "sensitivity"])
def test_rounds_follow_a_length_that_was_changed_before_training(score, trainer_of):
    config = AllocationConfig(score=score, num_rounds=4, ranks_per_round=2, scoring_examples=4)
    trainer = trainer_of("causal", num_train_epochs=1)
    allocation = attach(trainer, config)
    at_first = list(allocation.steps)
    trainer.args.num_train_epochs = 4
    trainer.train()
    record = allocation.record
    assert [entry.step for entry in record.rounds] == allocation.steps == list(record.round_steps)
    assert allocation.steps != at_first and len(allocation.steps) == 4
    assert record.note is None or "1" not in record.note.split()


def test_a_run_that_was_interrupted_gives_everything_back_when_it_is_detached(trainer_of):
    trainer = trainer_of("causal", callbacks=[KillAt(2)])
    attach(trainer, options(score="architecture", rank_lr_power=0.5))
    with pytest.raises(Interrupted):
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    gates = [layer.lora_A["default"] for layer in lora_layers(trainer.model).values()]
    assert all(a._forward_hooks for a in gates) and optimizer._optimizer_step_post_hooks
    detach(trainer)
    assert not any(a._forward_hooks for a in gates)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_ranks_and_losses(kind, trainer_of):
    runs = []
    for _ in range(2):
        trainer = trainer_of(kind)
        allocation = attach(trainer, options())
        trainer.train()
        runs.append((without_seconds(allocation.record.rounds), losses(trainer)))
    assert runs[0] == runs[1]


def test_another_seed_draws_other_scoring_examples(trainer_of):
    scores = []
    for seed in (0, 1):
        trainer = trainer_of("causal", num_eval=32)
        allocation = attach(trainer, options(num_rounds=1, seed=seed))
        trainer.train()
        scores.append(allocation.record.rounds[0].s_full)
    assert scores[0] != scores[1]


def test_with_gradient_accumulation_rounds_fall_on_optimiser_steps(trainer_of):
    trainer = trainer_of("causal", gradient_accumulation_steps=2, num_train_epochs=4)
    allocation = attach(trainer, options(num_rounds=2, warmup_epochs=1, recovery_epochs=1))
    trainer.train()
    assert trainer.state.max_steps == 12
    assert [entry.step for entry in allocation.record.rounds] == [3, 6]
    assert [entry.epoch for entry in allocation.record.rounds] == [1.0, 2.0]


def test_the_last_and_shorter_accumulation_of_an_epoch_counts_as_a_step(trainer_of):
    trainer = trainer_of("causal", gradient_accumulation_steps=4)
    allocation = attach(trainer, options(num_rounds=1, warmup_epochs=1))
    trainer.train()
    assert trainer.state.max_steps == 4
    assert [entry.step for entry in allocation.record.rounds] == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, trainer_of):
    trainer = trainer_of(kind, gradient_checkpointing=True)
    allocation = attach(trainer, options())
    trainer.train()
    assert len(allocation.record.rounds) == 3
    assert trainer.model.training and trainer.model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_decision(trainer_of):
    ranks = []
    for checkpointing in (False, True):
        trainer = trainer_of("causal", gradient_checkpointing=checkpointing)
        allocation = attach(trainer, options(num_rounds=1))
        trainer.train()
        ranks.append(allocation.record.ranks)
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("use_rslora", (False, True))
def test_the_scaling_of_every_module_stays(use_rslora, trainer_of):
    model = tiny.adapted(tiny.llama(), r=4, lora_alpha=8, use_rslora=use_rslora)
    trainer = trainer_of("causal", model=model)
    allocation = attach(trainer, options())
    trainer.train()
    assert len(set(ranks_now(model).values())) > 1
    expected = 8 / (4**0.5 if use_rslora else 4)
    scalings = [layer.scaling["default"] for layer in lora_layers(model).values()]
    assert scalings == pytest.approx([expected] * len(scalings))
    assert allocation.record.rounds


def test_a_bfloat16_backbone_with_a_float32_adapter(trainer_of):
    model = tiny.adapted(tiny.llama().to(torch.bfloat16), r=2)
    trainer = trainer_of("causal", model=model)
    allocation = attach(trainer, options())
    trainer.train()
    assert len(allocation.record.rounds) == 3
    assert {value.dtype for value in adapter(model).values()} == {torch.float32}
    frozen = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert frozen == {torch.bfloat16}


@pytest.mark.parametrize("kind", ("gpt2", "roberta"))
def test_other_architectures(kind, trainer_of):
    if kind == "gpt2":
        trainer = trainer_of("causal", model=tiny.adapted(tiny.gpt2(), r=2))
    else:
        model = tiny.adapted(tiny.roberta_classifier(), r=2)
        trainer = trainer_of("classification", model=model)
    start = sum(ranks_now(trainer.model).values())
    allocation = attach(trainer, options())
    trainer.train()
    assert len(allocation.record.rounds) == 3
    assert sum(ranks_now(trainer.model).values()) == start


def test_a_scoring_dataset_can_stand_in_for_the_eval_dataset(trainer_of):
    trainer = trainer_of("causal", num_eval=0)
    allocation = attach(trainer, options(), scoring_dataset=causal_rows(8, seed=5))
    trainer.train()
    assert len(allocation.record.rounds) == 3


def test_a_list_of_examples_is_a_dataset(trainer_of):
    trainer = trainer_of("causal")
    examples = [trainer.eval_dataset[index] for index in range(8)]
    scores = []
    for dataset in (trainer.eval_dataset, examples):
        trainer = trainer_of("causal")
        allocation = attach(trainer, options(num_rounds=1), scoring_dataset=dataset)
        trainer.train()
        scores.append(allocation.record.rounds[0].s_full)
    assert scores[0] == scores[1]


def test_the_users_own_optimiser_is_followed(trainer_of):
    model = tiny.adapted(tiny.llama(), r=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = trainer_of("causal", model=model, optimizers=(optimizer, None))
    allocation = attach(trainer, options(num_rounds=1))
    trainer.train()
    (entry,) = allocation.record.rounds
    layers = lora_layers(model)
    assert all(
        bool(weight_b(layers[name])[:, -count:].any()) for name, count in entry.added.items()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            PLACES | dict(rounds_at=[3, 12]),
            "`rounds_at` ends with 12, which is step 12, but the",
        ),
        (PLACES | dict(rounds_at=[0.5, 0.51]), "which are both step 6 of 12; leave out one of"),
        (dict(score="no_such_package:mine"), "no_such_package cannot be imported"),
        (dict(policy="torch:nothing"), "`policy` is 'torch:nothing', but torch has no 'nothing'"),
        (dict(min_rank=3), "raise the LoRA rank `r` to 3 or more, or lower `min_rank`"),
        (dict(ranks_per_round=28), "the adapter has only 28; lower it or raise the LoRA rank"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused_at_once(changes, words, trainer_of):
    with pytest.raises(ValueError, match=words):
        attach(trainer_of("causal"), options(**changes))


def test_the_papers_schedule_on_a_short_run_is_spread_and_said_and_recorded(trainer_of, caplog):
    trainer = trainer_of("causal")
    allocation = attach(trainer, AllocationConfig(scoring_examples=4))
    trainer.train()
    assert [entry.step for entry in allocation.record.rounds] == [1, 7]
    assert allocation.record.round_steps == [1, 7]
    assert allocation.record.note in caplog.text
    assert allocation.record.note == (
        "8 rounds need more than 2.75 epochs and the run has 2: 2 of them are spread over steps "
        "1 to 7"
    )


def test_places_of_ones_own(trainer_of):
    trainer = trainer_of("causal")
    allocation = attach(trainer, options(**PLACES, rounds_at=[0.25, 0.5]))
    trainer.train()
    assert [entry.step for entry in allocation.record.rounds] == [3, 6]


def test_a_score_and_a_policy_of_ones_own(trainer_of, tmp_path):
    def by_norm(objective, weights_b, limits):
        return Scores(terms={"norm": {n: b.detach().norm(dim=0) for n, b in weights_b.items()}})

    def fewer(scores, limits):
        return plan(scores, dataclasses.replace(limits, num_pruned=1))

    trainer = trainer_of("causal")
    allocation = attach(trainer, options(score=by_norm, policy=fewer))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for entry in Record.load(tmp_path / "final").rounds:
        assert entry.score.endswith("by_norm")
        assert sum(map(len, entry.pruned.values())) == 1
    assert len(allocation.record.rounds) == 3


def test_without_an_eval_dataset(trainer_of):
    with pytest.raises(ValueError, match="no `eval_dataset`; give it one, or pass"):
        attach(trainer_of("causal", num_eval=0), options())


def test_several_eval_datasets_are_taken_together(trainer_of, caplog):
    trainer = trainer_of("causal", num_eval=8)
    whole = attach(trainer, options(num_rounds=1, scoring_examples=8)).allocator
    trainer = trainer_of("causal", num_eval=8)
    first, second = (trainer.eval_dataset.select(rows) for rows in (range(3), range(3, 8)))
    trainer.eval_dataset = {"a": first, "b": second}
    parts = attach(trainer, options(num_rounds=1, scoring_examples=8)).allocator
    assert "scoring examples are drawn from a and b together" in caplog.text
    assert parts._objective.mean_loss() == pytest.approx(whole._objective.mean_loss())


def test_with_fewer_held_out_examples_than_wanted_all_are_used_and_it_is_said(trainer_of, caplog):
    trainer = trainer_of("causal", num_eval=8)
    allocation = attach(trainer, options(scoring_examples=32))
    assert (
        "measured on all 8 held-out examples, fewer than the 32 that were asked for" in caplog.text
    )
    trainer.train()
    assert len(allocation.record.rounds) == 3


def test_three_held_out_examples_are_too_few(trainer_of):
    with pytest.raises(ValueError, match="there are 3, of which one would decide; give at least 4"):
        attach(trainer_of("causal", num_eval=3), options(scoring_examples=32))


def test_an_eval_dataset_without_a_length(trainer_of):
    trainer = trainer_of("causal")
    trainer.eval_dataset = trainer.eval_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="cannot be drawn from a IterableDataset"):
        attach(trainer, options())


def test_a_train_dataset_without_a_length(trainer_of):
    trainer = trainer_of("causal", max_steps=12)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(trainer.eval_dataset))
    with pytest.raises(ValueError, match="the training set is a IterableDataset without a length"):
        attach(trainer, options())


def test_an_eval_dataset_without_labels(trainer_of):
    trainer = trainer_of("causal")
    trainer.eval_dataset = trainer.eval_dataset.remove_columns("labels")
    with pytest.raises(ValueError, match="labels"):
        attach(trainer, options())


def test_an_eval_dataset_without_a_supervised_position(trainer_of):
    trainer = trainer_of("causal")
    trainer.eval_dataset = Dataset.from_list(
        [{**row, "labels": [-100] * len(row["labels"])} for row in trainer.eval_dataset]
    )
    with pytest.raises(ValueError, match="hold no supervised position"):
        attach(trainer, options())


@pytest.mark.parametrize("way", ("fsdp", "deepspeed"))
def test_sharded_training_is_refused(way, trainer_of):
    trainer = trainer_of("causal")
    setattr(trainer, f"is_{way}_enabled", True)
    words = "keeps a part of the parameters in each process.*start the processes with `torchrun`"
    with pytest.raises(TypeError, match=words):
        attach(trainer, options())


def loaded_in_parts(trainer):
    """As Transformers loads a model by a `distributed_config`, which takes several processes."""
    trainer.is_distributed_loading_by_transformers = True
    trainer.model.get_base_model().config.distributed_config = DistributedConfig(fsdp_size=2)
    return trainer


@pytest.mark.parametrize("name", ("tp_size", "pp_size", "ep_size"))
def test_a_model_whose_layers_are_computed_in_parts_is_refused(name, trainer_of):
    trainer = loaded_in_parts(trainer_of("causal"))
    setattr(trainer.model.get_base_model().config.distributed_config, name, 2)
    with pytest.raises(TypeError, match=f"has `{name}` 2, by which a process .* use `fsdp_size`"):
        attach(trainer, options())


def test_a_part_that_trains_is_refused(trainer_of):
    trainer = loaded_in_parts(trainer_of("causal"))
    next(p for p in trainer.model.parameters() if p.requires_grad).placements = ()
    with pytest.raises(TypeError, match=r"lora_A.*, which trains, is one of them; leave it out of"):
        attach(trainer, options())


def test_several_gpus_in_one_process_are_refused(trainer_of, monkeypatch):
    trainer = trainer_of("causal")
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda self: 2))
    with pytest.raises(TypeError, match=r"There are 2 GPUs and one process.*torchrun --nproc"):
        attach(trainer, options())


def test_processes_that_would_train_alone_are_refused(trainer_of, monkeypatch):
    trainer = trainer_of("causal")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TypeError, match=r"one of 2, but its trainer trains alone.*`use_cpu=True`"):
        attach(trainer, options())


def test_dora_is_refused(trainer_of):
    model = tiny.adapted(tiny.llama(), r=2, use_dora=True)
    with pytest.raises(TypeError, match="uses `use_dora`, for which ranks cannot be allocated"):
        attach(trainer_of("causal", model=model), options())


def test_a_model_without_an_adapter_is_refused(trainer_of):
    with pytest.raises(TypeError, match="has no LoRA adapter named 'default'"):
        attach(trainer_of("causal", model=tiny.llama()), options())


def test_an_optimiser_whose_state_cannot_follow_is_refused(trainer_of):
    trainer = trainer_of("causal", optim="adafactor")
    attach(trainer, options())
    with pytest.raises(TypeError, match=r"Adafactor keeps `exp_avg_sq_row` of every parameter"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_optimiser_of_ones_own_is_refused_at_once(trainer_of):
    model = tiny.adapted(tiny.llama(), r=2)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-3)
    with pytest.raises(TypeError, match="LoraFAOptimizer keeps state under 'base_model"):
        attach(trainer_of("causal", model=model, optimizers=(optimizer, None)), options())


def test_scoring_rows_that_are_not_prepared_are_refused(trainer_of):
    rows = Dataset.from_list([{"text": "a film", "label": 0}] * 8)
    with pytest.raises(ValueError, match="have the columns text, label and no `input_ids`, which"):
        attach(trainer_of("causal"), options(), scoring_dataset=rows)


def test_attaching_twice_is_refused(trainer_of):
    trainer = trainer_of("causal")
    attach(trainer, options())
    with pytest.raises(ValueError, match="already"):
        attach(trainer, options())


def test_saving_before_any_round_is_refused(trainer_of, tmp_path):
    trainer = trainer_of("causal")
    attach(trainer, options())
    for save in (trainer.save_model, trainer.model.save_pretrained):
        with pytest.raises(RuntimeError, match="no round has taken place: it is plain LoRA"):
            save(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*"))


def test_a_checkpoint_before_the_first_round_is_no_error(trainer_of, tmp_path):
    trainer = trainer_of("causal", save_strategy="steps", save_steps=2)
    attach(trainer, options())
    trainer.train()
    assert Record.load(tmp_path / "checkpoint-2").rounds == []


def test_training_that_ends_before_the_first_round_is_an_error(trainer_of, tmp_path):
    trainer = trainer_of("causal", callbacks=[StopAt(2)])
    attach(trainer, options())
    with pytest.raises(RuntimeError, match=r"ended at step 2, before the first round .* at step 3"):
        trainer.train()
    with pytest.raises(RuntimeError, match="no round has taken place"):
        trainer.save_model(str(tmp_path / "saved"))


def test_training_again_without_resuming_is_refused(trainer_of):
    trainer = trainer_of("causal")
    attach(trainer, options())
    trainer.train()
    with pytest.raises(ValueError, match=r"3 rounds already, of a train\(\) before this"):
        trainer.train()


class _Poison(TrainerCallback):
    """Let the loss on the scoring examples be NaN from a step on."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                # Frozen: of weights that train the run itself says that they are not finite.
                model.get_base_model().lm_head.weight[0, 0] = float("nan")
            self.before = adapter(model)
            self.ranks = ranks_now(model)


def test_a_loss_that_is_not_finite_refuses_the_round_and_leaves_the_model(trainer_of):
    poison = _Poison(step=6)
    trainer = trainer_of("causal", callbacks=[poison])
    allocation = attach(trainer, options())
    with pytest.raises(ScoringError, match="Round 2 at step 6 was refused and the model left as"):
        trainer.train()
    assert len(allocation.record.rounds) == 1
    assert ranks_now(trainer.model) == poison.ranks
    after = adapter(trainer.model)
    assert all(
        torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0))
        for name, value in poison.before.items()
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [({"num_rounds": 2}, "are {'num_rounds': 2}; give an AllocationConfig"), (8, "options are 8;")],
)
def test_options_of_another_kind_are_refused(config, words, trainer_of):
    with pytest.raises(TypeError, match=words):
        attach(trainer_of("causal"), config)


def test_what_is_no_trainer_or_no_method_is_refused(trainer_of):
    trainer = trainer_of("causal")
    with pytest.raises(TypeError, match=r"The first argument is a Peft.*; give a transformers"):
        attach(trainer.model)
    for method in ("sora", get_method("sora")):
        with pytest.raises(TypeError, match=r"give one that is made, as in drive\(trainer, get_"):
            drive(trainer, method)


def test_an_adapter_of_pefts_adalora_is_told_where_to_go(trainer_of):
    trainer = trainer_of("causal")
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"])
    trainer.model = get_peft_model(tiny.llama(), config)
    with pytest.raises(TypeError, match=r"AdaLoRA, which has an allocation of its own"):
        attach(trainer)
