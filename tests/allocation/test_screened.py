import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloc.allocation.importance import ablation, gradient, screened
from loralloc.allocation.importance.screened import distances_to_cut
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, choose_pruned

NAMES = ("a", "b", "c", "d")


def scores_of(model, limits, **options):
    batches = tiny.micro_batches(tiny.batch_for(model), 3)
    return screened.score(
        Objective(model, batches), weights_b(lora_layers(model)), limits, **options
    )


def exact_of(model, limits):
    batches = tiny.micro_batches(tiny.batch_for(model), 3)
    return ablation.score(Objective(model, batches), weights_b(lora_layers(model)), limits)


def num_verified(scores):
    return sum(len(indices) for indices in scores.verified.values())


@pytest.mark.parametrize("build", tiny.MODELS)
@pytest.mark.parametrize("num_steps", [5, 40])
def test_prunes_what_ablation_prunes(build, num_steps):
    model = tiny.adapted(build(), r=3)
    batch = tiny.batch_for(model, num_examples=16, seed=7)
    tiny.train(model, batch, num_steps, tiny.optimizer_for(model, lr=2e-3))
    layers = lora_layers(model)
    exact = exact_of(model, Limits(num_pruned=1)).importance
    first, second = list(layers)[:2]
    several = [
        Limits(num_pruned=1),
        Limits(num_pruned=7),
        Limits(num_pruned=13, min_rank=2),
        Limits(num_pruned=5, protected={first: frozenset({0, 2}), second: frozenset({1})}),
        Limits(num_pruned=9, min_rank=1, protected={second: frozenset({0})}),
    ]
    for limits in several:
        scores = scores_of(model, limits, most=1000)
        assert scores.settled
        assert choose_pruned(scores.importance, limits) == choose_pruned(exact, limits)


def test_verified_ranks_are_exact_and_the_others_first_order():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4), 0.01)
    limits = Limits(num_pruned=7)
    objective = Objective(model, tiny.micro_batches(tiny.batch_for(model), 3))
    weights = weights_b(lora_layers(model))
    scores, exact = scores_of(model, limits), exact_of(model, limits)
    first_order = gradient.score(objective, weights, limits)
    assert 0 < num_verified(scores) < 56
    for name in weights:
        for index in range(4):
            source = exact if index in scores.verified.get(name, ()) else first_order
            for term, expected in (
                (scores.terms["without"], source.terms["without"]),
                (scores.terms["only"], source.terms["only"]),
            ):
                # Exact scores are float64, first-order ones float32.
                assert float(term[name][index]) == pytest.approx(float(expected[name][index]))


def test_a_good_first_order_needs_few_ranks_verified():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=8), 0.002)
    scores = scores_of(model, Limits(num_pruned=7))
    assert scores.settled
    assert num_verified(scores) <= 16  # of 112


def test_too_much_doubt_gives_first_order_alone():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4), 1.0)
    limits = Limits(num_pruned=7)
    weights = weights_b(lora_layers(model))
    objective = Objective(model, tiny.micro_batches(tiny.batch_for(model), 3))
    scores = scores_of(model, limits, most=10)
    first_order = gradient.score(objective, weights, limits)
    assert not scores.settled
    assert scores.verified == {}
    for name in weights:
        assert torch.equal(scores.terms["without"][name], first_order.terms["without"][name])
        assert torch.equal(scores.terms["only"][name], first_order.terms["only"][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_backbone_below_float32_the_first_order_decides_alone(dtype, monkeypatch):
    monkeypatch.setattr(ablation, "measure", None)  # calling it would fail
    model = tiny.with_trained_b(tiny.adapted(tiny.llama().to(dtype)))
    scores = scores_of(model, Limits(num_pruned=7))
    assert not scores.settled and scores.verified == {}
    assert all(term.dtype == torch.float32 for term in scores.importance.values())


@pytest.mark.parametrize("most", [3, 8, 12, 20])
def test_never_verifies_more_than_it_may(most, monkeypatch):
    measured = []

    def counting(objective, weights, wanted):
        measured.append(sum(len(indices) for indices in wanted.values()))
        return measure(objective, weights, wanted)

    measure = ablation.measure
    monkeypatch.setattr(ablation, "measure", counting)
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4), 0.3)
    scores_of(model, Limits(num_pruned=7), most=most)
    assert sum(measured) <= most


def test_without_verifying_nothing_is_settled():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4), 0.3)
    limits = Limits(num_pruned=7)
    scores = scores_of(model, limits, most=0)
    assert choose_pruned(scores.importance, limits) != choose_pruned(
        exact_of(model, limits).importance, limits
    )
    assert not scores.settled


def test_nothing_to_prune_is_settled():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2))
    assert scores_of(model, Limits(num_pruned=3, min_rank=2)).settled


@st.composite
def rounds(draw):
    """Distinct whole numbers as importance, so that a half decides between two of them."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    values = draw(st.permutations(range(0, 3 * sum(sizes), 3)))
    importance, start = {}, 0
    for name, size in zip(NAMES, sizes, strict=False):
        importance[name] = torch.tensor(values[start : start + size], dtype=torch.float64)
        start += size
    limits = Limits(
        num_pruned=draw(st.integers(0, sum(sizes) + 1)),
        min_rank=draw(st.integers(0, 3)),
        protected={name: draw(st.frozensets(st.integers(0, 3), max_size=2)) for name in importance},
    )
    return importance, limits


def moved(importance, name, index, by):
    changed = {key: values.clone() for key, values in importance.items()}
    changed[name][index] += by
    return changed


@given(rounds())
def test_less_than_its_distance_never_moves_a_rank_over_the_cut(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    for (name, index), distance in distances_to_cut(importance, limits).items():
        assert distance > 0
        for by in (distance - 0.5, 0.5 - distance):
            assert choose_pruned(moved(importance, name, index, by), limits) == pruned


@given(rounds())
def test_more_than_its_distance_moves_a_rank_over_the_cut(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    for (name, index), distance in distances_to_cut(importance, limits).items():
        is_pruned = index in pruned.get(name, ())
        by = distance + 0.5 if is_pruned else -distance - 0.5
        after = choose_pruned(moved(importance, name, index, by), limits)
        assert (index in after.get(name, ())) is not is_pruned


@given(rounds())
def test_a_rank_without_a_distance_decides_nothing(case):
    importance, limits = case
    pruned = choose_pruned(importance, limits)
    distances = distances_to_cut(importance, limits)
    for name, values in importance.items():
        for index in range(len(values)):
            if (name, index) not in distances:
                for by in (-1000.0, 1000.0):
                    assert choose_pruned(moved(importance, name, index, by), limits) == pruned


@given(rounds(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_no_error_below_half_the_distances_changes_what_is_pruned(case, random):
    """What screening relies on: it holds for all ranks wrong at once."""
    importance, limits = case
    distances = distances_to_cut(importance, limits)
    error = min(distances.values(), default=2.0) / 2 - 0.25
    wrong = {
        name: values + torch.tensor([random.uniform(-error, error) for _ in values])
        for name, values in importance.items()
    }
    assert choose_pruned(wrong, limits) == choose_pruned(importance, limits)
