"""Shrink: judge, prune or step back, and end with the smallest size that was not worse."""

import copy
import itertools
import re

import numpy as np
import pytest
import session
import tiny
import torch
from crossed import crossed
from reference.shrinking import sizes_by_look
from reference.truncated import singular_values, truncated
from session import Drive, prepared, products

from loralloc.allocation import comparison
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost, ranks
from loralloc.allocation.record import Record
from loralloc.allocation.shrinking import in_words
from loralloc.allocation.singular import take_singular_form
from loralloc.methods import shrink
from loralloc.methods.shrink import Shrink

FIRST_LOOK = 6
PLACES = (8, 10, 12)
LOOK = 14
LOOKS = (FIRST_LOOK, *PLACES, LOOK)


def made(model=None, *, rank=4, **options) -> Shrink:
    config = AllocationConfig(**{"rounds_at": PLACES, "tolerance": 9.0, **options})
    return prepared(Shrink(rank=rank, allocation=config), model or tiny.llama())


def parameters(method) -> int:
    return sum(rank_cost(x) * int(x.r["default"]) for x in lora_layers(method.model).values())


@pytest.fixture
def verdicts(monkeypatch):
    """Says of each size in turn whether it stays, in the place of its loss; none waits."""

    def say(*stays):
        queue = itertools.chain(stays, itertools.repeat(True))
        monkeypatch.setattr(comparison, "is_as_good", lambda *_: next(queue))
        monkeypatch.setattr(comparison, "still_falls", lambda *_: False)

    return say


def test_it_prunes_its_share_in_every_round_and_gives_none():
    method = made(prune_share=0.5)
    start = ranks(lora_layers(method.model))
    Drive(method).begin().train()
    method.finish()
    sizes = [size.ranks for size in method.record.frontier]
    assert sizes == [56, 56, 28, 14, 7, 7]
    assert [size.step for size in method.record.frontier] == [*LOOKS, session.STEPS]
    assert [size.parameters for size in method.record.frontier][-1] == parameters(method)
    assert all(not entry.added and not entry.lost for entry in method.record.rounds)
    assert [entry.step for entry in method.record.rounds] == list(PLACES)
    now = method.record.ranks
    assert sum(now.values()) == 7 and all(now[name] <= start[name] for name in start)


def test_a_size_that_is_worse_gives_way_to_the_one_before(verdicts):
    verdicts(True, True, False)
    method = made()
    drive = Drive(method).begin()
    drive.train(until=PLACES[1])
    before = method.record.frontier[2].parameters
    assert parameters(method) < before
    drive.train(until=PLACES[2])
    assert [size.kept for size in method.record.frontier] == [True, True, True, False]
    assert parameters(method) == before > method.record.frontier[3].parameters
    assert [entry.step for entry in method.record.rounds] == list(PLACES[:1])
    assert method.first_eligible_step() == PLACES[2] and method.is_over
    drive.train()  # nothing is judged or pruned any more
    method.finish()
    assert parameters(method) == before
    assert [size.step for size in method.record.frontier] == [*LOOKS[:-1], session.STEPS]


def test_it_prunes_waits_and_steps_back_as_the_reference_does(monkeypatch):
    outcomes = set()
    for seed in range(16):
        drawn = torch.Generator().manual_seed(seed)
        losses = torch.rand(len(LOOKS) + 1, 6, generator=drawn, dtype=torch.float64)
        losses += 0.4 * torch.rand(len(losses), 1, generator=drawn) + torch.rand(6, generator=drawn)
        queue = iter(losses)
        monkeypatch.setattr(
            comparison,
            "example_losses",
            lambda _, queue=queue: comparison.ExampleLosses(next(queue), torch.ones(6)),
        )
        method = made(tolerance=None)
        drive, found = Drive(method).begin(), []
        for look in LOOKS:
            drive.train(until=look)
            found.append(parameters(method))
        expected = sizes_by_look(losses[: len(LOOKS)].tolist(), None)
        assert [a == b for a, b in itertools.pairwise(found)] == [
            a == b for a, b in itertools.pairwise(expected)
        ], seed
        assert [a > b for a, b in itertools.pairwise(found)] == [
            a < b for a, b in itertools.pairwise(expected)
        ], seed
        outcomes.add(tuple(expected))
    assert len(outcomes) > 6  # among them rounds that pass, and steps back


def test_a_size_that_waited_stays_when_its_loss_rises(monkeypatch):
    falls = iter([False, True, False, False])
    monkeypatch.setattr(comparison, "still_falls", lambda *_: next(falls, False))
    as_good = iter([True])
    monkeypatch.setattr(comparison, "is_as_good", lambda *_: next(as_good, False))
    method = made()
    drive = Drive(method).begin()
    has = parameters(method)
    drive.train(until=PLACES[0])
    assert parameters(method) == has and method.record.frontier[-1].falling
    drive.train(until=PLACES[1])
    assert parameters(method) < has  # the same size, worse than before, and yet no step back
    drive.train(until=PLACES[2])
    assert parameters(method) == has and method.is_over


def test_stepping_back_brings_back_weights_and_moments_bit_for_bit(verdicts, monkeypatch):
    method = made(prune_share=0.8)
    verdicts(True, False)
    drive = Drive(method).begin()
    before = {}
    take = method.allocator.step

    def watched(optimizer, **where):
        before["weights"] = {n: p.detach().clone() for n, p in method.model.named_parameters()}
        before["moments"] = copy.deepcopy(optimizer.state_dict()["state"])
        return take(optimizer, **where)

    monkeypatch.setattr(method.allocator, "step", watched)
    drive.train(until=PLACES[1])
    now = dict(method.model.named_parameters())
    assert now.keys() == before["weights"].keys()
    assert all(torch.equal(now[name], weight) for name, weight in before["weights"].items())
    moments = drive.optimizer.state_dict()["state"]
    assert moments.keys() == before["moments"].keys()
    for slot, state in before["moments"].items():
        assert all(torch.equal(state[key], moments[slot][key]) for key in state)
    assert not method.record.rounds
    drive.train()
    method.finish()


@pytest.mark.parametrize(("at", "worse_at"), crossed([9, 11, 13], [1, 2, 3]))
def test_a_resumed_run_steps_back_as_one_that_was_not_stopped(at, worse_at, verdicts, tmp_path):
    def of(number):
        return [place != number for place in range(len(PLACES) + 1)]

    whole = made(prune_share=0.6)
    verdicts(*of(worse_at))
    drive = Drive(whole).begin()
    drive.train(until=at)
    whole.save(tmp_path)
    state, moments = copy.deepcopy((whole.state(), drive.optimizer.state_dict()))
    expected = drive.train()
    whole.finish()

    judged = len(Record.load(tmp_path).frontier)
    verdicts(*of(worse_at)[judged - 1 :])  # the size as it began was looked at twice
    resumed = made(prune_share=0.6)
    again = Drive(resumed)
    resumed.check_saved(tmp_path)
    resumed.load(tmp_path)
    if resumed.needs_state():
        resumed.load_state(state)
    again.done = at
    assert again.begin(moments=moments).train() == pytest.approx(expected, rel=1e-4)
    resumed.finish()
    assert resumed.record.ranks == whole.record.ranks
    assert [s.parameters for s in resumed.record.frontier] == [
        s.parameters for s in whole.record.frontier
    ]


@pytest.mark.parametrize("target", [700, 1500, 2500])
def test_a_target_is_met_whatever_the_loss(target, verdicts):
    verdicts(*[False] * 9)
    method = made(target_parameters=target, tolerance=None)
    has = parameters(method)
    Drive(method).begin().train()
    method.finish()
    largest = max(rank_cost(layer) for layer in lora_layers(method.model).values())
    assert target - largest < parameters(method) <= target < has
    sizes = [size.parameters for size in method.record.frontier]
    shares = [b / a for a, b in itertools.pairwise(sizes[: len(PLACES) + 1])]
    assert max(shares) - min(shares) < 0.15  # equal ones, to whole ranks
    assert f"{parameters(method):,} are left" in in_words(method.record)


@pytest.mark.parametrize("target", [50, 10**6])
def test_a_target_that_is_no_smaller_size_is_refused(target):
    with pytest.raises(ValueError, match=f"`target_parameters` is {target:,}, but the adapter has"):
        Drive(made(target_parameters=target, tolerance=None))


def test_no_module_falls_below_its_least_rank():
    method = made(min_rank=1, prune_share=0.9)
    Drive(method).begin().train()
    method.finish()
    assert set(method.record.ranks.values()) == {1}
    assert [size.ranks for size in method.record.frontier] == [56, 56, 14, 14, 14, 14]
    assert len(method.record.rounds) == 1


def test_ranks_and_sizes_are_measured_on_different_examples():
    method = made(prune_by="scores")
    drive = Drive(method)
    scored = [id(batch) for batch in method._scoring.batches]
    judged = [id(batch) for batch in method._comparison._objective.batches]
    assert scored and judged and not {*scored} & {*judged}
    assert {*scored, *judged} == {id(batch) for batch in drive.session.objective.batches}


def test_a_score_that_is_gathered_leaves_all_examples_to_the_sizes():
    method = made(score="sensitivity", prune_by="scores")
    drive = Drive(method).begin()
    assert not method._scoring.batches
    drive.train()
    method.finish()
    assert [size.ranks for size in method.record.frontier] == [56, 56, 39, 27, 19, 19]


@pytest.mark.parametrize("score", ["ablation", "random"])
def test_a_score_is_refused_where_singular_values_decide(score):
    with pytest.raises(ValueError, match=f"`score` is '{score}', which is read where shrinking"):
        Shrink(allocation=AllocationConfig(score=score))


def test_the_smallest_singular_values_of_all_modules_go_and_nothing_else_changes(monkeypatch):
    method = made(prune_share=0.5, rounds_at=(8,))
    drive, before = Drive(method).begin(), {}
    monkeypatch.setattr(
        shrink,
        "take_singular_form",
        lambda *of, **more: (before.update(products(method)), take_singular_form(*of, **more)),
    )
    drive.train(until=8)
    pool = sorted(value for product in before.values() for value in singular_values(product)[:4])
    for name, product in products(method).items():
        kept = int(lora_layers(method.model)[name].r["default"])
        np.testing.assert_allclose(product, truncated(before[name], kept), atol=1e-5)
        values = singular_values(before[name])[:4]
        assert kept == sum(value >= pool[28] - 1e-7 for value in values)
    assert sum(method.record.ranks.values()) == 28


def test_gates_that_are_a_part_of_the_model_are_refused():
    with pytest.raises(ValueError, match="'architecture', whose gates are a part of the model"):
        Drive(made(score="architecture", prune_by="scores"))


def test_a_run_that_ends_early_is_judged_where_it_ends(verdicts):
    verdicts(True, True, False)
    method = made()
    drive = Drive(method).begin()
    drive.train(until=11)
    size = method.record.frontier[-1].parameters
    method.finish()
    assert not method.record.frontier[-1].kept and parameters(method) == size


def test_a_run_that_ends_before_the_first_size_says_so():
    method = made()
    drive = Drive(method).begin()
    drive.train(until=3)
    assert method.unfinished().startswith("The adapter was to be shrunk, but no size was judged")
    with pytest.raises(
        RuntimeError, match="ended at step 3, before the first size was judged at step 6"
    ):
        method.finish()


def test_a_loss_that_is_no_number_ends_the_run_in_a_sentence():
    method = made()
    drive = Drive(method).begin()
    drive.train(until=7)
    with torch.no_grad():
        next(iter(lora_layers(method.model).values())).lora_A["default"].weight.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="held-out loss at step 8 is not finite"):
        method.after_step(8, 0.8)


def test_going_on_with_sizes_missing_is_refused():
    drive = Drive(made())
    drive.done = 11
    with pytest.raises(ValueError, match=r"at step 11, before which 3 sizes .*, but 0 were"):
        drive.begin()


@pytest.mark.parametrize(
    ("stays", "words"),
    [
        (
            (),
            r"r = 4 everywhere was [\d,]+ parameters; [\d,]+ do as well as any size of this run: "
            r"held-out loss \d.* Only the size that stays",
        ),
        ((True, False), r"r = 4 everywhere is [\d,]+ parameters, and none fewer did as well here"),
        (
            (True, True, False),
            r"[\d,]+ do as well as any size of this run: .*at best [\d.]+\. [\d,]+ are worse by",
        ),
    ],
)
def test_it_says_in_a_sentence_how_small_it_became(stays, words, verdicts):
    verdicts(*stays)
    method = made()
    Drive(method).begin().train()
    method.finish()
    assert re.search(words, in_words(method.record))


def test_where_the_loss_falls_all_along_nothing_is_pruned_and_that_is_said(monkeypatch):
    monkeypatch.setattr(comparison, "still_falls", lambda *_: True)
    method = made()
    Drive(method).begin().train()
    method.finish()
    assert not method.record.rounds and set(method.record.ranks.values()) == {4}
    assert re.search(
        r"r = 4 everywhere is [\d,]+ parameters, and none fewer was tried, since held-out loss "
        r"still fell at every look; train longer, or put `rounds_at` later",
        in_words(method.record),
    )


def test_of_other_records_nothing_is_said():
    assert in_words(Record(config={}, initial_ranks={"a": 1})) == ""
