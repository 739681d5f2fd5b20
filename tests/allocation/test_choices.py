"""A score and a policy may be the user's own, given themselves or by their place."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import tiny
import torch

from loralloc.allocation import choices
from loralloc.allocation.allocator import Allocator, ScoringError
from loralloc.allocation.config import POLICIES, SCORE_OPTIONS, SCORES, AllocationConfig
from loralloc.allocation.importance import ablation, screened
from loralloc.allocation.importance.tracker import Tracker
from loralloc.allocation.layers import lora_layers, ranks
from loralloc.allocation.policy import Plan, Scores, plan
from loralloc.allocation.record import Record

HERE = __name__


def of_ones(weights_b, value=1.0):
    return {name: torch.full((b.shape[1],), value) for name, b in weights_b.items()}


def by_norm(objective, weights_b, limits, *, power=1):
    """A score of a user's own: the norm of the column of B."""
    norms = {name: b.detach().norm(dim=0) ** power for name, b in weights_b.items()}
    return Scores(terms={"norm": norms}, settled=False)


class Steps(Tracker):
    """A tracker of a user's own: how many steps a rank has seen."""

    def __init__(self, model, *, adapter_name="default", start=0.0):
        layers = lora_layers(model, adapter_name)
        self.counts = {n: torch.full((r,), start) for n, r in ranks(layers, adapter_name).items()}

    def observe(self):
        for count in self.counts.values():
            count += 1

    def score(self):
        return Scores(terms={"steps": {n: count.clone() for n, count in self.counts.items()}})

    def follow(self, plan, *, optimizer):
        self.counts = {
            n: torch.cat([count[list(plan.kept[n])], torch.zeros(plan.added[n])])
            for n, count in self.counts.items()
            if plan.rank_after(n)
        }

    def finish(self):
        pass

    def state(self):
        return self.counts

    def load_state(self, state):
        self.counts = dict(state)


class Learner(Steps):
    def learn(self, batches):
        pass


class Unfinished(Tracker):
    def score(self):
        pass


class NoTracker:
    pass


def first_rank_of_the_first_module(scores, limits):
    """A policy of a user's own, which only ever shrinks."""
    sizes = {name: len(values) for name, values in scores.importance.items()}
    gone = next(iter(sizes))
    return Plan(
        kept={n: tuple(range(1 if n == gone else 0, size)) for n, size in sizes.items()},
        added=dict.fromkeys(sizes, 0),
        pruned={gone: (0,)},
    )


def of_two_arguments(objective, weights_b):
    pass


NUMBER = 7


def allocator_of(model=None, *, tracked=False, **options):
    model = model or tiny.with_trained_b(tiny.adapted(tiny.llama()))
    batches = [] if tracked else [tiny.batch_for(model)]
    return Allocator(model, AllocationConfig(**options), batches)


# Ours.


@pytest.mark.parametrize("name", SCORES)
def test_every_score_of_ours_is_found_and_takes_its_options(name):
    assert choices.is_gathered(AllocationConfig(score=name)) is (
        name in ("architecture", "sensitivity", "norm", "random")
    )
    fields = AllocationConfig.__dataclass_fields__
    assert set(SCORE_OPTIONS.get(name, {}).values()) <= set(fields)


def test_options_reach_our_scores(monkeypatch):
    seen = {}

    def score(objective, weights_b, limits, **options):
        seen.update(options)
        return Scores(terms={"one": of_ones(weights_b)})

    monkeypatch.setattr(screened, "score", score)
    allocator = allocator_of(score="screened", verify_ranks=17)
    allocator.step(None)
    assert seen == {"most": 17, "policy": allocator._policy}


def test_the_papers_policy_is_the_default():
    assert AllocationConfig().policy in POLICIES
    model, again = (tiny.with_trained_b(tiny.adapted(tiny.llama())) for _ in range(2))
    by_default = allocator_of(model).step(None)
    given = Allocator(again, AllocationConfig(), [tiny.batch_for(again)], policy=plan).step(None)
    assert by_default.ranks_after == given.ranks_after


# A user's own.


@pytest.mark.parametrize("given", [by_norm, f"{HERE}:by_norm"], ids=["itself", "by its place"])
def test_a_score_of_ones_own_decides_and_is_recorded_by_name(given, tmp_path):
    allocator = allocator_of(score=given, ranks_per_round=1)
    norms = by_norm(None, choices_weights(allocator), None).importance
    lowest = min((float(x), name, i) for name, of in norms.items() for i, x in enumerate(of))
    entry = allocator.step(None)
    assert entry.pruned == {lowest[1]: [lowest[2]]}
    assert entry.score == f"{HERE}:by_norm"
    allocator.record.save(tmp_path)
    assert Record.load(tmp_path) == allocator.record
    assert json.loads((tmp_path / "allocation.json").read_text())["config"]["score"] == entry.score


def choices_weights(allocator):
    layers = lora_layers(allocator.model)
    return {name: layer.lora_B["default"].weight for name, layer in layers.items()}


def test_a_score_with_options_bound_to_it():
    entry = allocator_of(score=functools.partial(by_norm, power=2)).step(None)
    assert entry.score == f"{HERE}:by_norm"


@pytest.mark.parametrize("given", [Steps, f"{HERE}:Steps", functools.partial(Steps, start=5.0)])
def test_a_tracker_of_ones_own_gathers_until_the_last_round(given):
    allocator = allocator_of(tracked=True, score=given, num_rounds=2)
    assert allocator.is_gathering
    for _ in range(3):
        allocator.observe()
    entry = allocator.step(None)
    assert entry.score == f"{HERE}:Steps"
    assert {x for of in entry.terms["steps"].values() for x in of} in ({3.0}, {8.0})
    assert set(allocator.state()) == set(ranks(lora_layers(allocator.model)))
    allocator.step(None)
    assert not allocator.is_gathering


def test_a_tracker_that_learns_from_batches_says_so():
    learning = (Learner, f"{HERE}:Learner", functools.partial(Learner, start=1.0), "architecture")
    for score in learning:
        assert choices.learns_from_batches(AllocationConfig(score=score))
    for score in (Steps, by_norm, "sensitivity", "gradient"):
        assert not choices.learns_from_batches(AllocationConfig(score=score))


def test_scoring_batches_for_a_tracker_are_refused():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match=f"`score` is '{HERE}:Steps', which is gathered while"):
        Allocator(model, AllocationConfig(score=Steps), [tiny.batch_for(model)])


@pytest.mark.parametrize(
    "given", [first_rank_of_the_first_module, f"{HERE}:first_rank_of_the_first_module"]
)
@pytest.mark.parametrize("score", ["gradient", "screened"])
def test_a_policy_of_ones_own_decides_and_is_recorded_by_name(given, score, tmp_path):
    allocator = allocator_of(policy=given, score=score)
    first, total = next(iter(allocator.record.ranks)), sum(allocator.record.ranks.values())
    entry = allocator.step(None)
    assert entry.pruned == {first: [0]}
    assert sum(entry.ranks_after.values()) == total - 1
    allocator.record.save(tmp_path)
    config = json.loads((tmp_path / "allocation.json").read_text())["config"]
    assert config["policy"] == f"{HERE}:first_rank_of_the_first_module"


def test_a_policy_given_to_the_allocator_is_the_configurations():
    model = tiny.adapted(tiny.llama())
    allocator = Allocator(
        model,
        AllocationConfig(),
        [tiny.batch_for(model)],
        policy=first_rank_of_the_first_module,
    )
    assert allocator.config.policy is first_rank_of_the_first_module
    assert allocator.record.config["policy"] == f"{HERE}:first_rank_of_the_first_module"


def test_the_guides_example_runs():
    guide = Path(__file__).parents[2] / "docs" / "guide.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "def by_norm" in block]
    found = {}
    exec(example, found)
    entry = allocator_of(score=found["by_norm"], policy=found["prune_only"]).step(None)
    assert sum(entry.ranks_after.values()) == 14 * 4 - 7


# What is refused before the first step.


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        (
            "score",
            "no_such_package.scores:mine",
            "`score` is 'no_such_package.scores:mine', but no_such_package.scores cannot be "
            "imported (ModuleNotFoundError: No module named 'no_such_package'); name a module that "
            "Python finds from where the run is started.",
        ),
        ("score", f"{HERE}:by_nrom", f"but {HERE} has no 'by_nrom'. Did you mean '{HERE}:by_norm'"),
        ("policy", f"{HERE}:nothing", f"`policy` is '{HERE}:nothing', but {HERE} has no 'nothing'"),
        ("score", f"{HERE}:NUMBER", "is a int and cannot be called; name a function or a class."),
        (
            "score",
            of_two_arguments,
            f"`score` is '{HERE}:of_two_arguments', which takes (objective, weights_b) (too many "
            "positional arguments); it is called as (objective, weights_b, limits).",
        ),
        (
            "score",
            functools.partial(by_norm, power=2, limits=None),
            "it is called as (objective, weights_b, limits).",
        ),
        ("score", NoTracker, f"`score` is '{HERE}:NoTracker', a class but no Tracker; give a"),
        ("score", Unfinished, "a Tracker without finish and follow and load_state and state; def"),
        ("policy", by_norm, "it is called as (scores, limits)."),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(option, value, words):
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError) as error:
        Allocator(model, AllocationConfig(**{option: value}), [tiny.batch_for(model)])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "failing_score.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be imported \(RuntimeError: no licence\)"):
        allocator_of(score="failing_score:mine")


def test_a_configuration_imports_nothing():
    assert AllocationConfig(score="no_such_package:mine").score == "no_such_package:mine"


# What is refused at a round, with the model as it was.


def bits(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def refused(words, error=ValueError, **options):
    allocator = allocator_of(**options)
    before = bits(allocator.model)
    with pytest.raises(error) as raised:
        allocator.step(None)
    assert words in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(bits(allocator.model), before, strict=True))
    assert allocator.record.rounds == []


def reversed_order(by_module):
    return dict(reversed(by_module.items()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda b: None, "gave a NoneType; give a `Scores`."),
        (lambda b: Scores(terms={}), "gave no term; a rank's importance is the sum of one or more"),
        (
            lambda b: Scores(terms={"one": dict(list(of_ones(b).items())[1:])}),
            "that has not the adapter's modules in model order (model.layers.0.self_attn.q_proj is",
        ),
        (
            lambda b: Scores(terms={"one": reversed_order(of_ones(b))}),
            "in model order (the order differs)",
        ),
        (
            lambda b: Scores(terms={"one": {n: torch.ones(9) for n in b}}),
            "gave a tensor of shape (9,) as 'one' of model.layers.0.self_attn.q_proj, which has 4",
        ),
        (
            lambda b: Scores(terms={"one": {n: [1.0] * 4 for n in b}}),
            "gave list as 'one' of model.layers.0.self_attn.q_proj; give a tensor of floats of",
        ),
        (
            lambda b: Scores(terms={"one": {n: torch.ones(4, dtype=torch.long) for n in b}}),
            "gave torch.int64 as 'one'",
        ),
        (
            lambda b: Scores(terms={"one": of_ones(b)}, s_full=torch.ones(())),
            "gave a Tensor as `s_full` or `s_base`; give a number",
        ),
    ],
)
def test_scores_that_are_not_of_these_ranks(given, words):
    refused(words, score=lambda objective, weights_b, limits: given(weights_b))


def test_scores_that_are_not_finite():
    def score(objective, weights_b, limits):
        return Scores(terms={"one": of_ones(weights_b, float("nan"))})

    refused(
        "importance is not finite in model.layers.0.self_attn.q_proj", ScoringError, score=score
    )


def with_(change):
    """The paper's plan with some of its fields changed."""
    first = "model.layers.0.self_attn.q_proj"

    def policy(scores, limits):
        decided = plan(scores, limits)
        values = {
            "kept": dict(decided.kept),
            "added": dict(decided.added),
            "pruned": dict(decided.pruned),
        }
        change(values, first)
        return Plan(**values)

    return policy


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda scores, limits: {}, "gave a dict; give a `Plan`."),
        (
            with_(lambda p, first: p["kept"].pop(first)),
            "does not have every module of the adapter and no other in `kept` (model.layers.0.self",
        ),
        (
            with_(lambda p, first: p["kept"].update({first: (1, 0, 2, 3)})),
            "keeps [1, 0, 2, 3] and prunes",
        ),
        (
            with_(lambda p, first: p.update(kept={**p["kept"], first: ()}, pruned={})),
            "put every index from 0 into one of the two, ascending.",
        ),
        (
            with_(lambda p, first: p["added"].update({first: -1})),
            "adds -1 ranks to model.layers.0.self_attn.q_proj; give a whole number from 0.",
        ),
        (
            with_(
                lambda p, first: p.update(
                    kept=dict.fromkeys(p["kept"], ()),
                    added=dict.fromkeys(p["added"], 0),
                    pruned=dict.fromkeys(p["kept"], (0, 1, 2, 3)),
                )
            ),
            "leaves no rank; keep at least one.",
        ),
    ],
)
def test_plans_that_cannot_be_carried_out(policy, words):
    refused(words, policy=policy)


def test_screening_asks_the_policy_for_the_cut(monkeypatch):
    def fewer(scores, limits):
        return plan(scores, dataclasses.replace(limits, num_pruned=1))

    measured = []
    measure = ablation.measure

    def counting(objective, weights, wanted):
        measured.append({(name, i) for name, indices in wanted.items() for i in indices})
        return measure(objective, weights, wanted)

    monkeypatch.setattr(ablation, "measure", counting)
    nearest = []
    for policy in (plan, fewer):
        measured.clear()
        allocator_of(score="screened", policy=policy).step(None)
        nearest.append(measured[0])
    assert not nearest[0] & nearest[1]
