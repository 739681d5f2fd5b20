"""Length buckets: little padding, random order, the same again after a resume."""

import itertools

import pytest
import tiny
import trainers
from hypothesis import given
from hypothesis import strategies as st

from loralloc.training.batches import BUCKETS, POOL, BucketSampler


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 3))
def test_every_example_comes_once_an_epoch(lengths, batch_size, epoch):
    sampler = BucketSampler(lengths, batch_size=batch_size, seed=0)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    assert sorted(sampler) == list(range(len(lengths)))


def batches(sampler, size):
    order = list(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_a_pool_is_cut_into_batches_of_like_length():
    lengths = [7 * i % 101 for i in range(4 * 25)]  # one pool
    sampler = BucketSampler(lengths, batch_size=4, seed=0)
    spans = sorted(sorted(lengths[i] for i in batch) for batch in batches(sampler, 4))
    assert all(low[-1] <= high[0] for low, high in itertools.pairwise(spans))


def test_long_batches_come_anywhere_not_first():
    lengths = list(range(4 * POOL))
    first = [
        lengths[batch[0]] for batch in batches(BucketSampler(lengths, batch_size=4, seed=0), 4)
    ]
    assert first != sorted(first) and first != sorted(first, reverse=True)


def test_a_smaller_batch_stays_the_last():
    lengths = [1] * 9 + [50]
    for seed in range(5):
        assert len(batches(BucketSampler(lengths, batch_size=4, seed=seed), 4)[-1]) == 2


def test_the_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = BucketSampler(list(range(64)), batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("strategy", [BUCKETS, "random"])
def test_the_trainer_takes_it_where_it_is_asked_for(strategy, tmp_path):
    from datasets import Dataset

    from loralloc.runs.heads.classification import SafeTrainer

    rows = [{"input_ids": [1] * (1 + i % 9), "labels": i % 2} for i in range(24)]
    from transformers import TrainingArguments

    trainer = SafeTrainer(
        model=tiny.bert_classifier(),
        args=TrainingArguments(
            **trainers.arguments(tmp_path, train_sampling_strategy=strategy, seed=5)
        ),
        train_dataset=Dataset.from_list(rows),
    )
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, BucketSampler) == (strategy == BUCKETS)
    if strategy == BUCKETS:
        same = BucketSampler([len(row["input_ids"]) for row in rows], batch_size=4, seed=5)
        assert list(sampler) == list(same)
