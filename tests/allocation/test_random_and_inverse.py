"""The controls of an allocation: importance that is drawn, and the paper's policy turned round."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance.random import Random
from loralloc.allocation.inverse import plan_inverse
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.policy import Limits, Scores, plan


def drawn(model, *, seed=0, rounds=1):
    """Ranks after so many rounds, and the draws of each."""
    config = AllocationConfig(score="random", num_rounds=rounds, ranks_per_round=6, seed=seed)
    allocator = Allocator(model, config)
    entries = [allocator.step(None) for _ in range(rounds)]
    return ranks(lora_layers(model)), [entry.terms["draw"] for entry in entries]


def flat(terms):
    return torch.tensor([value for values in terms.values() for value in values])


def test_importance_is_drawn_by_the_seed_anew_at_every_round():
    first, terms = drawn(tiny.adapted(tiny.llama()), rounds=2)
    again, same = drawn(tiny.adapted(tiny.llama()), rounds=2)
    other, _ = drawn(tiny.adapted(tiny.llama()), seed=1, rounds=2)
    assert first == again and terms == same
    assert first != other
    assert sum(first.values()) == 14 * 4
    both = torch.stack([flat(entry)[:20] for entry in terms])
    assert (both[0] - both[1]).abs().min() > 0
    assert both.min() >= 0 and both.max() < 1


def test_weights_say_nothing_about_it():
    _, plain = drawn(tiny.adapted(tiny.llama()))
    _, trained = drawn(tiny.with_trained_b(tiny.adapted(tiny.llama())))
    assert plain == trained


def test_new_rows_are_not_the_draws_over_again():
    model = tiny.adapted(tiny.llama())
    before = ranks(lora_layers(model))
    after, (terms,) = drawn(model)
    grown = next(name for name in after if after[name] > before[name])
    row = lora_layers(model)[grown].lora_A["default"].weight[-1]
    bound = row.shape[0] ** -0.5
    uniform = (row.detach() / bound + 1) / 2
    assert not torch.isclose(uniform[:, None], flat(terms)[None], atol=1e-6).any()


def test_a_resumed_run_draws_what_was_to_come():
    model = tiny.adapted(tiny.llama())
    whole = Random(model, seed=3)
    whole.follow(plan(whole.score(), Limits(num_pruned=1)), optimizer=None)
    resumed = Random(model, seed=3)
    resumed.load_state(whole.state())
    expected, found = (flat(of.score().terms["draw"]) for of in (whole, resumed))
    assert torch.equal(expected, found)
    with pytest.raises(ValueError, match=r"\(nothing\) is not of 'random'; resume with the score"):
        resumed.load_state({})


scores = st.lists(st.lists(st.integers(-4, 4), max_size=4), min_size=1, max_size=5)


@given(scores, st.integers(1, 6))
def test_inverse_prunes_the_highest_and_gives_to_the_lowest_mean(values, num_pruned):
    importance = {f"m{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(values)}
    if not sum(map(len, importance.values())) > num_pruned:
        return
    found = plan_inverse(Scores(terms={"one": importance}), Limits(num_pruned=num_pruned))
    # The slow way: all in one list, highest first, the earlier of equal ones first.
    pool = sorted((-v, i, j) for i, x in enumerate(values) for j, v in enumerate(x))[:num_pruned]
    gone = {(f"m{i}", j) for _, i, j in pool}
    assert {(name, j) for name, js in found.pruned.items() for j in js} == gone
    receivers = [n for n, x in importance.items() if len(x) and n not in found.pruned]
    first = min(receivers, key=lambda n: float(importance[n].mean()), default=None)
    assert first is None or found.added[first] == max(found.added.values())


def test_inverse_is_the_paper_on_turned_scores_and_the_record_keeps_the_true_ones():
    results = {}
    for policy in ("paper", "inverse"):
        model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
        config = AllocationConfig(policy=policy, ranks_per_round=6)
        results[policy] = Allocator(model, config, [tiny.batch_for(model)]).step(None)
    assert results["paper"].terms == results["inverse"].terms
    gone = {
        policy: {(name, i) for name, indices in entry.pruned.items() for i in indices}
        for policy, entry in results.items()
    }
    assert len(gone["paper"]) == len(gone["inverse"]) == 6
    assert not gone["paper"] & gone["inverse"]
