"""What a round costs grows with the model, and not with the rounds before it."""

import sys

import pytest
import tiny

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig


def calls(work) -> int:
    """Functions called, which no other process on the machine changes."""
    count = [0]

    def see(frame, event, argument):
        count[0] += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count[0]


def running(model, num_rounds, **options):
    """A round after a step of training, again and again."""
    batch, optimizer = tiny.batch_for(model), tiny.optimizer_for(model)
    tiny.train(model, batch, 2, optimizer)
    config = AllocationConfig(num_rounds=num_rounds, seed=0, **options)
    allocator = Allocator(model, config, tiny.micro_batches(batch, 6))

    def take(number):
        allocator.step(optimizer, step=number, epoch=0.0)

    def train():
        tiny.train(model, batch, 1, optimizer)

    return allocator, take, train


def test_a_round_costs_no_more_after_many():
    allocator, take, train = running(tiny.adapted(tiny.llama(), r=2), 60, ranks_per_round=4)
    costs = {}
    for number in range(1, 61):
        costs[number] = calls(lambda n=number: take(n))
        train()
    early, late = (max(costs[n] for n in range(at, at + 5)) for at in (6, 56))
    assert late < 1.1 * early
    assert min(allocator.record.ranks.values()) == 0  # a module without a rank is no obstacle


def test_a_round_grows_with_the_modules():
    costs = []
    for blocks in (2, 8):
        model = tiny.adapted(tiny.llama(num_hidden_layers=blocks), r=2)
        _, take, train = running(model, 3)
        take(1)
        train()
        costs.append(calls(lambda take=take: take(2)))
    assert costs[1] < 4.4 * costs[0]


def test_a_rank_of_256():
    allocator, take, train = running(tiny.adapted(tiny.llama(), r=256), 2)
    for number in (1, 2):
        take(number)
        train()
    assert sum(allocator.record.ranks.values()) == 256 * len(allocator.record.ranks)


@pytest.mark.parametrize("taken_back", (1, 2, 3))
def test_births_are_counted_anew_where_rounds_were_taken_back(taken_back):
    allocator, take, train = running(tiny.adapted(tiny.llama(), r=2), 9)
    record = allocator.record
    for number in range(1, 5):
        take(number)
        train()
    whole = record.births()
    assert whole is not record.births()
    gone = [record.rounds.pop() for _ in range(taken_back)]
    shorter = record.births()
    assert {name: len(of) for name, of in shorter.items()} == record.ranks
    record.rounds += reversed(gone)
    assert record.births() == whole
