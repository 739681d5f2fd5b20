"""Half of the training examples for the weights, half for what is searched for."""

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from trainers import STEPS_PER_EPOCH, Interrupted, KillAt, causal_rows, causal_trainer
from transformers import Trainer

from loralloc.training.batches import BUCKETS, LengthBuckets
from loralloc.training.halves import second_half

ROWS = {tuple(row["input_ids"]): number for number, row in enumerate(causal_rows(24))}
"""The number of a training example by its tokens."""


def rows_of(batch) -> list[int]:
    return [ROWS[tuple(tokens)] for tokens in batch["input_ids"].tolist()]


def halved(trainer, **options):
    """Batches of half 2, with the trainer drawing from half 1."""
    held_back, trainer._get_train_sampler = second_half(trainer, **options)
    return held_back


def train(trainer, *, until_step, seed=0, resume=None, per_step=1):
    """What each step saw of either half: by step, its rows."""
    held_back = halved(trainer, until_step=until_step, seed=seed)
    weights, others = {}, {}
    own_step = trainer.training_step

    def training_step(model, inputs, *args):
        step = trainer.state.global_step + 1
        weights.setdefault(step, []).extend(rows_of(inputs))
        if step not in others:
            others[step] = [row for _ in range(per_step) for row in rows_of(next(held_back))]
        return own_step(model, inputs, *args)

    trainer.training_step = training_step
    if any(isinstance(callback, KillAt) for callback in trainer.callback_handler.callbacks):
        with pytest.raises(Interrupted):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    return weights, others


def together(by_step, steps) -> list[int]:
    return sorted(row for step in steps for row in by_step[step])


EPOCHS = [range(1, 7), range(7, 13)]


def test_until_the_step_the_weights_see_one_half_twice_an_epoch_then_everything(tmp_path):
    weights, others = train(causal_trainer(tmp_path), until_step=STEPS_PER_EPOCH)
    half = sorted(set(together(weights, EPOCHS[0])))
    assert len(half) == 12
    assert together(weights, EPOCHS[0]) == sorted(2 * half)
    assert together(weights, EPOCHS[1]) == list(range(24))
    assert together(others, [1, 2, 3]) == together(others, [4, 5, 6])  # a pass and another
    assert sorted(half + together(others, [1, 2, 3])) == list(range(24))
    assert others[1] != others[4]


def test_every_pass_over_a_half_is_in_an_order_of_its_own(tmp_path):
    passes = [range(1, 4), range(4, 7), range(7, 10), range(10, 13)]
    for by_step in train(causal_trainer(tmp_path), until_step=12):
        orders = [tuple(row for step in steps for row in by_step[step]) for steps in passes]
        assert len(set(orders)) == 4 and len({tuple(sorted(order)) for order in orders}) == 1


def test_the_step_may_be_anywhere_in_an_epoch(tmp_path):
    weights, others = train(causal_trainer(tmp_path), until_step=8)
    half = set(range(24)) - set(together(others, range(1, 7)))
    assert set(together(weights, range(1, 9))) <= half
    assert not set(together(weights, range(9, 13))) <= half
    assert len(weights) == 12


@pytest.mark.parametrize("count", [24, 22])
def test_after_the_step_come_whole_passes_wherever_in_an_epoch_it_is(count, tmp_path):
    trainer = causal_trainer(tmp_path, num_train_epochs=3)
    trainer.train_dataset = trainer.train_dataset.select(range(count))
    weights, _ = train(trainer, until_step=8)
    seen = together(weights, range(9, 15))
    assert len(seen) == count
    # Of a set that is no whole number of batches, what the small last step of an epoch is short of.
    assert len(set(seen)) >= count - (24 - count)
    assert weights[9] != weights[15]  # another pass, in another order


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_the_order_is_the_trainers_own(strategy, tmp_path):
    trainer = causal_trainer(tmp_path, train_sampling_strategy=strategy)
    weights, _ = train(trainer, until_step=3)
    order = [row for step in range(1, 4) for row in weights[step]]
    assert (order == sorted(order)) == (strategy == "sequential")
    assert sorted(set(order)) == sorted(order)


def test_with_accumulation_a_step_has_as_many_batches_of_either_half(tmp_path):
    trainer = causal_trainer(tmp_path, gradient_accumulation_steps=2)
    weights, others = train(trainer, until_step=3, per_step=2)
    assert {len(rows) for by_step in (weights, others) for rows in by_step.values()} == {8}
    half = set(together(weights, [1, 2, 3]))
    assert together(others, [1, 2]) == sorted([*(set(range(24)) - half), *others[2][4:]])
    assert together(weights, [4, 5, 6]) == list(range(24))


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6, 7])
def test_resumed_it_goes_on_as_if_it_had_not_stopped(step, tmp_path):
    expected = train(causal_trainer(tmp_path / "whole"), until_step=8)
    saving = dict(save_strategy="steps", save_steps=step)
    train(causal_trainer(tmp_path, callbacks=[KillAt(step)], **saving), until_step=8)
    found = train(causal_trainer(tmp_path), until_step=8, resume=tmp_path / f"checkpoint-{step}")
    for whole, resumed in zip(expected, found, strict=True):
        assert resumed == {number: rows for number, rows in whole.items() if number > step}


def test_batches_that_are_fetched_ahead_belong_to_their_own_step(tmp_path):
    expected, _ = train(causal_trainer(tmp_path), until_step=3)
    trainer = causal_trainer(tmp_path)
    halved(trainer, until_step=3, seed=0)
    ahead = [rows_of(batch) for batch in trainer.get_train_dataloader()]  # no step is taken
    assert ahead == [expected[step] for step in EPOCHS[0]]


def test_another_seed_divides_otherwise_and_the_same_seed_the_same(tmp_path):
    halves = [
        set(together(train(causal_trainer(tmp_path), until_step=12, seed=seed)[0], EPOCHS[0]))
        for seed in (0, 0, 1)
    ]
    assert halves[0] == halves[1] != halves[2]


def test_batches_of_either_half_keep_to_like_lengths(tmp_path):
    class Bucketed(LengthBuckets, Trainer):
        pass

    lengths = torch.randint(1, 60, (197,), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = causal_trainer(tmp_path, train_sampling_strategy=BUCKETS)
    trainer.__class__ = Bucketed
    trainer.train_dataset = Dataset.from_list(
        [{"input_ids": [1] * length, "labels": 0} for length in lengths]
    )
    trainer.data_collator = lambda rows: {"spans": [len(row["input_ids"]) for row in rows]}
    held_back = halved(trainer, until_step=1000, seed=0)
    mine = [batch["spans"] for batch in trainer.get_train_dataloader()]
    trainer.state.global_step = 0
    others = [next(held_back)["spans"] for _ in range(24)]
    assert [len(batch) for batch in mine] == [4] * 49 + [1]
    spans = [max(batch) - min(batch) for batch in (*mine[:48], *others)]
    assert max(spans) <= 12  # of 58, for batches at random


def test_the_trainers_columns_and_collator_are_used(tmp_path):
    trainer = causal_trainer(tmp_path)
    trainer.train_dataset = trainer.train_dataset.add_column("name", ["x"] * 24)
    batch = next(halved(trainer, until_step=6, seed=0))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len(batch["labels"]) == 4


def test_a_list_of_examples_is_a_dataset(tmp_path):
    expected = train(causal_trainer(tmp_path), until_step=6)
    trainer = causal_trainer(tmp_path)
    trainer.train_dataset = [{**row, "name": "x"} for row in trainer.train_dataset]
    assert train(trainer, until_step=6) == expected


def test_half_smaller_than_a_batch(tmp_path):
    trainer = causal_trainer(tmp_path)
    trainer.train_dataset = trainer.train_dataset.select(range(5))
    weights, others = train(trainer, until_step=2)
    assert [len(weights[step]) for step in (1, 2)] == [4, 1]
    assert len(set(weights[1]) | set(others[1])) == 5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda rows: rows.select([0]), "the training set has 1; use one with at least 2"),
        (lambda rows: IterableDataset.from_generator(lambda: iter(rows)), "has no length"),
    ],
)
def test_what_cannot_be_divided_is_refused(data, words, tmp_path):
    trainer = causal_trainer(tmp_path)
    trainer.train_dataset = data(trainer.train_dataset)
    with pytest.raises(ValueError, match=words):
        second_half(trainer, until_step=1, seed=0)


class TrainerWithLoader(Trainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


def test_a_loader_of_ones_own_is_refused(tmp_path):
    trainer = causal_trainer(tmp_path)
    trainer.__class__ = TrainerWithLoader
    with pytest.raises(ValueError, match="has a `get_train_dataloader` of its own, by which"):
        second_half(trainer, until_step=1, seed=0)


def test_an_order_of_whole_batches_is_refused(tmp_path):
    trainer = causal_trainer(tmp_path, model=tiny.adapted(tiny.llama()))
    trainer.args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match="use 'random' or 'group_by_length'"):
        second_half(trainer, until_step=1, seed=0)
