import pytest
import rounding
import tiny
import torch

from loralloc.allocation.importance import ablation, gradient, screened
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Plan, choose_pruned


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


@pytest.mark.parametrize(
    "build",
    [
        *(tiny.llama, tiny.gpt2, tiny.bert_classifier),
        pytest.param(tiny.roberta_classifier, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("num_steps", [5, pytest.param(40, marks=pytest.mark.slow)])
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
    atol = rounding.of_losses(model, exact.s_full, exact.s_base)
    for name in weights:
        for index in range(4):
            source = exact if index in scores.verified.get(name, ()) else first_order
            for term, expected in (
                (scores.terms["without"], source.terms["without"]),
                (scores.terms["only"], source.terms["only"]),
            ):
                assert float(term[name][index]) == pytest.approx(
                    float(expected[name][index]), rel=0, abs=atol
                )


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


def one_of_each_module(scores, limits):
    """A policy of another rule than the lowest of one pool."""
    pruned = {name: (int(x.argmin()),) for name, x in scores.importance.items()}
    kept = {
        name: tuple(i for i in range(len(x)) if i not in pruned[name])
        for name, x in scores.importance.items()
    }
    return Plan(kept=kept, added=dict.fromkeys(kept, 0), pruned=pruned)


def test_under_a_policy_of_another_rule_what_it_prunes_is_what_ablation_would():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4), 0.3)
    limits = Limits(num_pruned=7)
    exact = one_of_each_module(exact_of(model, limits), limits)
    scores = scores_of(model, limits, most=1000, policy=one_of_each_module)
    assert scores.settled
    assert one_of_each_module(scores, limits) == exact
    first_order = scores_of(model, limits, most=0)
    assert one_of_each_module(first_order, limits) != exact


def test_where_the_policys_cut_cannot_be_told_within_the_limit_the_first_order_decides():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=4))
    scores = scores_of(model, Limits(num_pruned=7), most=20, policy=one_of_each_module)
    assert not scores.settled and scores.verified == {}
