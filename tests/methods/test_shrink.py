"""Shrink: prune as much as held-out loss does not feel, and say how small the adapter became."""

import copy
import itertools
import re

import numpy as np
import pytest
import session
import tiny
import torch
from reference.shrinking import num_pruned
from reference.truncated import singular_values, truncated
from session import Drive, prepared, products

from loralloc.allocation.comparison import ExampleLosses
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, rank_cost, ranks, weights_ab
from loralloc.allocation.record import Record
from loralloc.allocation.shrinking import in_words
from loralloc.allocation.singular import take_singular_form
from loralloc.methods import shrink
from loralloc.methods.shrink import Shrink

LOOK = 6
PLACES = (8, 10, 12)
"""Rounds, after the one that only looks."""


def made(model=None, *, rank=4, **options) -> Shrink:
    config = AllocationConfig(**{"rounds_at": (LOOK, *PLACES), "tolerance": 9.0, **options})
    return prepared(Shrink(rank=rank, allocation=config), model or tiny.llama())


def weights_of(method) -> dict[str, list[torch.Tensor]]:
    pairs = weights_ab(lora_layers(method.model)).items()
    return {name: [weight.detach().clone() for weight in pair] for name, pair in pairs}


def parameters(method) -> int:
    return sum(rank_cost(x) * int(x.r["default"]) for x in lora_layers(method.model).values())


@pytest.fixture
def verdicts(monkeypatch):
    """Says of each size that is tried whether it is taken, in the place of its loss."""

    def say(*taken):
        queue = itertools.chain(taken, itertools.repeat(True))
        monkeypatch.setattr(shrink, "is_as_good", lambda *_, **__: next(queue))
        monkeypatch.setattr(shrink, "still_falls", lambda *_, **__: False)

    return say


def test_it_prunes_its_share_in_every_round_and_gives_none():
    method = made(prune_share=0.5)
    start = ranks(lora_layers(method.model))
    Drive(method).begin().train()
    method.finish()
    sizes = [size.ranks for size in method.record.frontier]
    assert sizes == [56, 28, 14, 7, 7]
    assert [size.step for size in method.record.frontier] == [LOOK, *PLACES, session.STEPS]
    assert [size.parameters for size in method.record.frontier][-1] == parameters(method)
    assert all(not entry.added and not entry.lost for entry in method.record.rounds)
    assert [entry.step for entry in method.record.rounds if entry.pruned] == list(PLACES)
    now = method.record.ranks
    assert sum(now.values()) == 7 and all(now[name] <= start[name] for name in start)


def test_what_costs_too_much_is_tried_by_halves_and_the_round_may_pass(verdicts):
    verdicts(True, False, False, True, False, False, False)
    method = made(prune_share=0.4)
    drive = Drive(method).begin()
    drive.train(until=PLACES[1])
    found = [(size.ranks, size.kept) for size in method.record.frontier]
    assert found == [(56, True), (34, True), (20, False), (27, False), (31, True)]
    weights = {n: p.detach().clone() for n, p in method.model.named_parameters()}
    drive.train(until=PLACES[2])
    assert [entry.pruned for entry in method.record.rounds][-1] == {}
    assert [size.kept for size in method.record.frontier[5:]] == [False] * 3
    now = dict(method.model.named_parameters())
    assert now.keys() == weights.keys() and parameters(method) > 0
    assert all(now[name].shape == weight.shape for name, weight in weights.items())
    drive.train()
    method.finish()
    assert method.record.frontier[-1].ranks == 31 == sum(method.record.ranks.values())


def test_how_much_goes_is_what_the_reference_says(monkeypatch):
    found, expected = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = 1 + 0.2 * torch.rand(99, 6, generator=generator, dtype=torch.float64)
        drawn[1:] += 0.1 * torch.rand(98, 1, generator=generator)
        queue = iter(drawn)
        monkeypatch.setattr(
            shrink,
            "losses_without",
            lambda *_, queue=queue, **__: ExampleLosses(next(queue), torch.ones(6)),
        )
        method = made(tolerance=None, rounds_at=(8,), prune_share=0.4)
        Drive(method).begin().train(until=8)
        found.append(sum(map(len, method.record.rounds[0].pruned.values())))
        counts = [22, 11, 6]
        after = dict(zip(counts, drawn[1:4].tolist(), strict=True))
        expected.append(num_pruned(drawn[0].tolist(), after, counts, None))
    assert found == expected
    assert set(found) == {22, 11, 6, 0}


def test_what_a_size_costs_is_measured_with_exactly_its_ranks_off():
    method = made(prune_share=0.5, rounds_at=(8,))
    drive = Drive(method).begin()
    drive.train(until=7)
    drive.train(until=8)
    now = method._losses()
    size = method.record.frontier[1]
    assert size.loss == pytest.approx(now.mean, rel=1e-5)  # the ranks have gone since
    assert size.worse_by == pytest.approx(size.loss - method.record.frontier[0].loss, rel=1e-6)


def test_modules_that_shrank_train_at_rates_of_their_own():
    after = []
    for power in (0.0, 0.5):
        method = made(prune_share=0.5, rounds_at=(8,), rank_lr_power=power)
        drive = Drive(method).begin()
        drive.train(until=8)
        before = weights_of(method)
        drive.train(until=9)
        after.append(weights_of(method))
        left = method.record.ranks
    assert len({rank for rank in left.values() if rank}) > 1
    for name, begun in before.items():
        for weight, at_one_rate, at_its_own in zip(
            begun, after[0][name], after[1][name], strict=True
        ):
            expected = weight + (4 / left[name]) ** 0.5 * (at_one_rate - weight)
            torch.testing.assert_close(at_its_own, expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("score", ["norm", "random"])
def test_by_scores_ranks_stay_as_they_are_trained(score, monkeypatch):
    monkeypatch.setattr(shrink, "take_singular_form", None)
    method = made(prune_by="scores", score=score)
    Drive(method).begin().train(until=8)
    assert list(method.record.rounds[0].terms) == [{"norm": "norm", "random": "draw"}[score]]


@pytest.mark.parametrize("at", [9, 11, 13])
@pytest.mark.parametrize("options", [{}, {"prune_by": "scores"}], ids=["singular", "scores"])
def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(at, options, tmp_path):
    whole = made(prune_share=0.6, **options)
    drive = Drive(whole).begin()
    drive.train(until=at)
    whole.save(tmp_path)
    state, moments = copy.deepcopy((whole.state(), drive.optimizer.state_dict()))
    expected = drive.train()
    whole.finish()

    resumed = made(prune_share=0.6, **options)
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


def test_a_round_passes_while_training_still_lowers_the_loss(monkeypatch):
    looks = iter([5.0, 4.0, 3.99, 3.0, 2.99])
    monkeypatch.setattr(
        shrink,
        "losses_without",
        lambda _, off, *__, **___: ExampleLosses(
            torch.full((4,), 9.0 if off else next(looks)), torch.ones(4)
        ),
    )
    method = made(tolerance=0.5)
    drive = Drive(method).begin()
    tried = {}
    for step in (LOOK, *PLACES):
        before = len(method.record.frontier)
        drive.train(until=step)
        tried[step] = len(method.record.frontier) - before
    assert tried == {LOOK: 1, PLACES[0]: 0, PLACES[1]: 3, PLACES[2]: 0}
    assert [bool(entry.pruned) for entry in method.record.rounds] == [False] * 4


def test_where_the_loss_falls_all_along_that_is_said(monkeypatch):
    monkeypatch.setattr(shrink, "still_falls", lambda *_, **__: True)
    method = made()
    Drive(method).begin().train()
    method.finish()
    assert "parameters, and fewer were not tried, since held-out loss" in in_words(method.record)


def test_a_single_round_does_not_wait():
    method = made(rounds_at=(8,))
    Drive(method).begin().train(until=8)
    assert method.record.rounds[0].pruned


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
    shares = [b / a for a, b in itertools.pairwise(sizes[: len(PLACES) + 2])]
    assert max(shares) - min(shares) < 0.2  # equal ones, to whole ranks
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
    assert [size.ranks for size in method.record.frontier] == [56, 14, 14]
    assert [bool(entry.pruned) for entry in method.record.rounds] == [False, True, False, False]


def test_ranks_and_sizes_are_measured_on_different_examples():
    method = made(prune_by="scores")
    drive = Drive(method)
    scored = [id(batch) for batch in method._scoring.batches]
    judged = [id(batch) for batch in method._judging.batches]
    assert scored and judged and not {*scored} & {*judged}
    assert {*scored, *judged} == {id(batch) for batch in drive.session.objective.batches}


@pytest.mark.parametrize("options", [{}, {"score": "sensitivity", "prune_by": "scores"}])
def test_where_no_examples_are_scored_all_are_for_the_sizes(options):
    method = made(**options)
    drive = Drive(method).begin()
    assert not method._scoring.batches
    drive.train()
    method.finish()
    assert [size.ranks for size in method.record.frontier] == [56, 39, 27, 19, 19]


@pytest.mark.parametrize("score", ["ablation", "random"])
def test_a_score_is_refused_where_singular_values_decide(score):
    with pytest.raises(ValueError, match=f"`score` is '{score}', which is read where shrinking"):
        Shrink(allocation=AllocationConfig(score=score))


def test_a_score_that_asks_more_than_once_what_is_pruned_is_refused():
    with pytest.raises(ValueError, match="'screened', which asks what is pruned more than once"):
        made(prune_by="scores", score="screened")
    with pytest.raises(ValueError, match="`verify_ranks` is 5, which shrinking does not read"):
        made(verify_ranks=5)


def test_gates_that_are_a_part_of_the_model_are_refused():
    with pytest.raises(ValueError, match="'architecture', whose gates are a part of the model"):
        Drive(made(score="architecture", prune_by="scores"))


def test_a_run_that_ends_early_keeps_the_size_it_has():
    method = made()
    Drive(method).begin().train(until=11)
    size = method.record.frontier[-1].parameters
    method.finish()
    assert [s.step for s in method.record.frontier] == [6, 8, 10, 11]
    assert method.record.frontier[-1].parameters == parameters(method) == size


def test_a_run_that_ends_before_the_first_round_says_so():
    method = made()
    drive = Drive(method).begin()
    drive.train(until=3)
    assert method.unfinished().startswith("The adapter was to be shrunk, but no size was judged")
    with pytest.raises(RuntimeError, match="ended at step 3, before the first round at step 6"):
        method.finish()


def test_a_loss_that_is_no_number_ends_the_run_in_a_sentence():
    method = made()
    drive = Drive(method).begin()
    drive.train(until=7)
    with torch.no_grad():
        next(iter(lora_layers(method.model).values())).lora_A["default"].weight.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="held-out loss at step 7 is not finite"):
        method._losses()


def test_going_on_with_rounds_missing_is_refused():
    drive = Drive(made())
    drive.done = 11
    with pytest.raises(ValueError, match=r"at step 11, before which 3 rounds .*, but 0 took place"):
        drive.begin()


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ((), r"r = 4 everywhere was [\d,]+ parameters; [\d,]+ do as well here: held-out loss \d.*"),
        ((False,) * 9, r"r = 4 everywhere is [\d,]+ parameters, and none fewer did as well here"),
        (
            (True, True, *(False,) * 3),
            r"[\d,]+ do as well here: held-out loss [\d.]+ at the end\. [\d,]+ cost -?[\d.]+ at",
        ),
    ],
)
def test_it_says_in_a_sentence_how_small_it_became(taken, words, verdicts):
    verdicts(*taken)
    method = made()
    Drive(method).begin().train()
    method.finish()
    assert re.search(words, in_words(method.record))


def test_of_other_records_nothing_is_said():
    assert in_words(Record(config={}, initial_ranks={"a": 1})) == ""
