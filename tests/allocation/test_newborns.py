"""Ranks that are too young to be compared with the others, and what a run says of churn."""

import logging

import pytest
import tiny
import torch

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.policy import Scores
from loralloc.allocation.record import Record


def newest_are_least_important(objective, weights_b, limits):
    only = {name: -torch.arange(b.shape[1], dtype=torch.float32) for name, b in weights_b.items()}
    return Scores(terms={"only": only})


def rounds_at(steps, *, score=newest_are_least_important, **options):
    """An allocation on three modules of rank 3, one rank a round, untrained."""
    model = tiny.adapted(tiny.llama(num_hidden_layers=3), r=3, target_modules=["k_proj"])
    config = AllocationConfig(ranks_per_round=1, score=score, **options)
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    for step in steps:
        allocator.step(None, step=step)
    return allocator.record


def ages_of_the_pruned(record):
    """For every round, the steps that each rank it pruned had trained."""
    begun, ages = [0, *(entry.step for entry in record.rounds)], []
    for number, entry in enumerate(record.rounds):
        past = Record(config={}, initial_ranks=record.initial_ranks, rounds=record.rounds[:number])
        born = past.births()
        ages.append(
            [entry.step - begun[born[n][i]] for n, gone in entry.pruned.items() for i in gone]
        )
    return ages


def test_protected_ranks_go_once_they_have_trained_as_long_as_the_first_ones_had():
    record = rounds_at([10, 14, 19, 20, 24, 30], newborns="protected")
    ages = ages_of_the_pruned(record)
    # The newest is the least important, so that each goes as soon as it may: at 10 steps or more.
    assert ages == [[10], [14], [19], [10], [10], [11]]
    assert {entry.churn for entry in record.rounds[1:]} == {0}
    competing = rounds_at([10, 14, 19, 20, 24, 30])
    assert min(min(of) for of in ages_of_the_pruned(competing)) < 10
    assert {entry.churn for entry in competing.rounds[1:]} == {1}


def test_the_budget_stays_where_only_young_ranks_are_left():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2, target_modules=["k_proj"]))
    config = AllocationConfig(ranks_per_round=3, newborns="protected")
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    for step in range(10, 18):
        entry = allocator.step(None, step=step)
        assert sum(entry.ranks_after.values()) + entry.lost + entry.spare == sum(
            entry.ranks_before.values()
        )
    assert not entry.pruned and not entry.added


def test_the_age_of_a_rank_needs_the_step():
    with pytest.raises(ValueError, match=r"round 1 is said to be at step 0 and none is; pass"):
        rounds_at([0], newborns="protected")
    with pytest.raises(ValueError, match=r"round 2 is said to be at step 10 and round 1 was at"):
        rounds_at([10, 10], newborns="protected")
    rounds_at([0, 0])  # where all compete, a step is for the record only


def test_a_run_says_what_most_new_ranks_going_at_once_means():
    note = rounds_at([10, 14, 19]).churn_note
    assert note.startswith("100% of the ranks that rounds gave were pruned in the round after")
    assert note.endswith('let it train first with `newborns="protected"` or "potential"')
    assert rounds_at([10, 14, 19], newborns="protected").churn_note == ""
    assert rounds_at([10]).churn_note == ""
    # Where they are as old as they have to be and go all the same, other words are in place.
    late = rounds_at([2, 4, 6], newborns="protected")
    assert late.churn_note.endswith("or place the rounds further apart")


def test_it_is_said_at_the_end_of_a_run_of_any_trainer(caplog, make_trainer):
    trainer, allocation = make_trainer(newest_are_least_important)
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        trainer.train()
    said = [entry.getMessage() for entry in caplog.records]
    assert said == [f"loralloc: {allocation.record.churn_note}."] and allocation.record.churn_note


@pytest.fixture
def make_trainer(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    from loralloc import attach

    def make(score):
        rows = Dataset.from_dict({k: v.tolist() for k, v in tiny.causal_batch(16).items()})
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        model = tiny.adapted(tiny.llama(num_hidden_layers=3), r=3, target_modules=["k_proj"])
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=default_data_collator,
        )
        config = AllocationConfig(
            score=score, rounds_at=(1, 2, 3), ranks_per_round=1, scoring_examples=4
        )
        return trainer, attach(trainer, config)

    return make
