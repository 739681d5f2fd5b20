"""The order of an epoch that is gone on with, where several processes share its batches."""

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader

from loralloc.training.batches import BucketSampler
from loralloc.training.processes import set_epoch


def loader(*, skips: int, epoch: int | None = None):
    sampler = BucketSampler([n % 7 for n in range(40)], batch_size=4, seed=0)
    shared = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, 0)
    made = DataLoader(range(40), batch_sampler=SkipBatchSampler(shared, skips) if skips else shared)
    if epoch is not None:
        set_epoch(made, epoch)
    return [batch.tolist() for batch in made]


@pytest.mark.parametrize("skips", [0, 2])
def test_the_epoch_reaches_the_sampler_through_whatever_is_around_it(skips):
    assert loader(skips=skips, epoch=1) == loader(skips=0, epoch=1)[skips:]
    assert loader(skips=skips, epoch=1) != loader(skips=skips)


def test_a_loader_without_batches_of_its_own_is_left_alone():
    set_epoch(iter(()), 1)
