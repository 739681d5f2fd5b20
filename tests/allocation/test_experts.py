"""Experts that are one parameter: a rank of them is one of each, and moves like any other."""

import mixtures
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from reference import experts as slow

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.comparison import example_losses, losses_without
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance import gradient, shapley
from loralloc.allocation.importance.sensitivity import BETA_1, BETA_2, Sensitivity
from loralloc.allocation.layers import (
    experts_of,
    lora_layers,
    rank_cost,
    ranks,
    weights_ab,
    weights_b,
)
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, Plan
from loralloc.allocation.resize import resize
from loralloc.allocation.singular import take_singular_form

# PEFT looks for patterns of ranks among modules only, and uses those of parameters all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")

BUILDS = [mixtures.qwen3_moe, mixtures.mixtral]
DOWN, GATE_UP = "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
FIRST = "model.layers.0."


def adapted(build=mixtures.qwen3_moe, r: int = 2, **options) -> PeftModel:
    """LoRA on attention, on both parameters of all experts and on the router, in training mode."""
    chosen = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    on = dict(target_parameters=[DOWN, GATE_UP, "mlp.gate.weight"])
    backbone = build(output_router_logits=False)
    return tiny.with_trained_b(tiny.adapted(backbone, r=r, **{**chosen, **on, **options}))


def logits(model) -> torch.Tensor:
    batch = tiny.causal_batch()
    with torch.no_grad():
        return model.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits


def limits_of(model) -> Limits:
    return Limits(num_pruned=1, experts=experts_of(lora_layers(model)))


@pytest.mark.parametrize("build", BUILDS)
def test_they_are_layers_named_by_their_parameters(build):
    layers = lora_layers(adapted(build))
    assert set(layers) == {
        f"model.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.v_proj", DOWN, GATE_UP, "mlp.gate.weight")
    }
    assert experts_of(layers) == {
        f"model.layers.{i}.{n}": 4 for i in (0, 1) for n in (DOWN, GATE_UP)
    }
    narrow = 48 if build is mixtures.mixtral else 16
    assert rank_cost(layers[FIRST + DOWN]) == 4 * (32 + narrow)
    assert rank_cost(layers[FIRST + GATE_UP]) == 4 * (32 + 2 * narrow)
    assert rank_cost(layers[FIRST + "mlp.gate.weight"]) == 32 + 4


@pytest.mark.parametrize("build", BUILDS)
def test_the_reference_is_peft(build):
    model, batch = adapted(build), tiny.causal_batch()
    gates = slow.gates_all(model, 1.0)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(slow.logits(model.eval(), inputs, gates), logits(model))


@pytest.mark.parametrize("build", BUILDS)
def test_scores_are_the_derivatives_by_one_gate_for_all_experts(build):
    model, batch = adapted(build, r=3).eval(), tiny.causal_batch()
    for size in (2, 6):
        objective = Objective(model, tiny.micro_batches(batch, size))
        scores = gradient.score(objective, weights_b(lora_layers(model)), limits_of(model))
        for term, value in (("without", 1.0), ("only", 0.0)):
            expected = slow.gate_derivatives(model, batch, value)
            assert scores.terms[term].keys() == expected.keys()
            for name, of in expected.items():
                torch.testing.assert_close(scores.terms[term][name], of, rtol=1e-4, atol=1e-6)


def test_shares_of_all_ranks_sum_to_the_improvement():
    """Where all experts see every token; where they are chosen, the loss jumps along the path."""
    model = adapted(lambda **options: mixtures.qwen3_moe(num_experts_per_tok=4, **options))
    objective = Objective(model, [tiny.causal_batch()])
    scores = shapley.score(objective, weights_b(lora_layers(model)), limits_of(model))
    total = sum(float(x.sum()) for x in scores.importance.values())
    assert {len(x) for x in scores.importance.values()} == {2}
    assert total == pytest.approx(scores.s_full - scores.s_base, rel=0.02)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 4), min_size=10, max_size=10))
def test_ranks_added_anywhere_leave_the_function_as_it_is(wanted):
    model = adapted()
    before = logits(model)
    resize(model, dict(zip(lora_layers(model), wanted, strict=True)))
    assert list(ranks(lora_layers(model)).values()) == wanted
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("name", [FIRST + DOWN, FIRST + GATE_UP, FIRST + "mlp.gate.weight"])
def test_a_rank_that_goes_is_its_gate_at_zero(name):
    model = adapted(r=3)
    gates = slow.gates_all(model, 1.0)
    gates[name][1] = 0.0
    batch = tiny.causal_batch()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = slow.logits(model.eval(), inputs, gates)
    kept = {other: (0, 1, 2) for other in lora_layers(model)} | {name: (0, 2)}
    resize(model, Plan(kept=kept, added=dict.fromkeys(kept, 0), pruned={name: (1,)}))
    assert ranks(lora_layers(model))[name] == 2
    torch.testing.assert_close(logits(model), expected)


def test_the_smallest_ranks_go_by_the_norm_over_all_experts():
    model = adapted(r=3)
    name = FIRST + DOWN
    layer = lora_layers(model)[name]
    with torch.no_grad():  # rank 1 of every expert, but for one that has nearly nothing
        layer.lora_B["default"].weight.view(32, 3, 4)[:, 1] *= 10
        layer.lora_B["default"].weight.view(32, 3, 4)[:, 1, 2] *= 1e-6
    assert resize(model, {name: 1}).kept[name] == (1,)


@pytest.mark.parametrize("name", [DOWN, GATE_UP, "mlp.gate.weight"])
@pytest.mark.parametrize("build", BUILDS)
def test_stock_peft_opens_unequal_ranks_and_one_that_has_left(build, name, tmp_path):
    model = adapted(build, r=3)
    left = "model.layers.1." + name
    resize(model, {FIRST + DOWN: 1, FIRST + GATE_UP: 5, FIRST + "mlp.gate.weight": 2, left: 0})
    assert left not in lora_layers(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(build(output_router_logits=False), tmp_path)
    assert ranks(lora_layers(opened)) == ranks(lora_layers(model))
    torch.testing.assert_close(logits(opened), before, rtol=0, atol=0)
    merged = opened.merge_and_unload()
    torch.testing.assert_close(logits(merged), before)


def test_all_of_them_may_leave(tmp_path):
    model = adapted()
    wanted = {name: 0 for name in lora_layers(model) if "mlp" in name}
    resize(model, wanted)
    before = logits(model)
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(mixtures.qwen3_moe(output_router_logits=False), tmp_path)
    assert len(lora_layers(opened)) == 4
    torch.testing.assert_close(logits(opened), before, rtol=0, atol=0)


@pytest.mark.parametrize("new_state", ["zero", "survivors"])
def test_the_optimisers_state_goes_with_each_experts_ranks(new_state):
    model, batch = adapted(r=3), tiny.causal_batch()
    optimizer = tiny.optimizer_for(model)
    tiny.train(model, batch, 3, optimizer)
    name, kept = FIRST + GATE_UP, (0, 2)
    layer = lora_layers(model)[name]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = [(w.detach().clone(), dict(optimizer.state[w])) for w in (a, b)]
    plan = {other: (0, 1, 2) for other in lora_layers(model)} | {name: kept}
    added = dict.fromkeys(plan, 0) | {name: 2}
    resize(
        model,
        Plan(kept=plan, added=added, pruned={name: (1,)}),
        optimizer=optimizer,
        new_state=new_state,
    )
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((16, 32), (32, 16))
    for (old, state), new, is_a in zip(before, (a, b), (True, False), strict=True):
        assert optimizer.state[new]["step"] == state["step"]
        now = {"weight": new.detach(), **optimizer.state[new]}
        for key, value in {"weight": old, **state}.items():
            if key == "step":
                continue
            for e in range(4):
                for k, was in enumerate(kept):  # as PEFT's layout has them, written out
                    mine = now[key][e * 4 + k] if is_a else now[key][:, k * 4 + e]
                    theirs = value[e * 3 + was] if is_a else value[:, was * 4 + e]
                    assert torch.equal(mine, theirs)
                if key == "exp_avg_sq":
                    fresh = now[key][e * 4 + 3] if is_a else now[key][:, 3 * 4 + e]
                    rows = [value[e * 3 + k] if is_a else value[:, k * 4 + e] for k in kept]
                    mean = torch.stack(rows).mean(dim=0) * (new_state == "survivors")
                    torch.testing.assert_close(fresh, mean)
    tiny.train(model, batch, 1, optimizer)


def test_ranks_of_experts_are_switched_off_in_all_of_them():
    model = adapted(r=3)
    objective = Objective(model, tiny.micro_batches(tiny.causal_batch(), 3))
    name, layers = FIRST + DOWN, lora_layers(model)
    found = losses_without(objective, {name: (0, 2)}, experts_of(layers), adapter_name="default")
    keep_rank_1 = Plan(
        kept={n: ((1,) if n == name else tuple(range(r))) for n, r in ranks(layers).items()},
        added=dict.fromkeys(layers, 0),
        pruned={name: (0, 2)},
    )
    resize(model, keep_rank_1)
    torch.testing.assert_close(found.sums, example_losses(objective).sums)


def test_parameters_of_experts_keep_the_form_that_they_were_trained_in():
    model = adapted(r=3)
    before = {
        n: [w.detach().clone() for w in pair] for n, pair in weights_ab(lora_layers(model)).items()
    }
    expected = logits(model)
    take_singular_form(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    layers = lora_layers(model)
    for name, pair in weights_ab(layers).items():
        same = all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))
        assert same is (name in experts_of(layers))


@pytest.mark.parametrize(
    ("score", "newborns"),
    [(score, "compete") for score in ("gradient", "sensitivity", "norm", "random")]
    + [("shapley", "potential")],
)
def test_rounds_keep_the_budget_in_parameters(score, newborns):
    model, batch = adapted(r=4), tiny.causal_batch()
    optimizer = tiny.optimizer_for(model)
    config = AllocationConfig(
        score=score, newborns=newborns, budget="parameters", ranks_per_round=6, num_rounds=3
    )
    held_out = [] if score in ("sensitivity", "norm", "random") else tiny.micro_batches(batch, 3)
    allocator = Allocator(model, config, held_out)
    costs = {name: rank_cost(layer) for name, layer in lora_layers(model).items()}
    budget = 4 * sum(costs.values())
    for number in range(1, 4):
        for _ in range(2):
            model.train()(**batch).loss.backward()
            optimizer.step()
            allocator.observe()
            optimizer.zero_grad()
        entry = allocator.step(optimizer, step=2 * number)
        counts = ranks(lora_layers(model))
        spent = sum(costs[name] * rank for name, rank in counts.items())
        assert entry.pruned
        assert spent + entry.spare + sum(r.lost for r in allocator.record.rounds) == budget
    tiny.train(model, batch, 1, optimizer)


def test_sensitivity_is_the_mean_over_a_ranks_elements_of_all_experts():
    model, batch = adapted(r=3), tiny.causal_batch()
    tracker = Sensitivity(model)
    model(**batch).loss.backward()
    tracker.observe()
    layer, terms = lora_layers(model)[FIRST + DOWN], tracker.score().terms
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    share = (1 - BETA_1) * (1 - BETA_2) * BETA_1  # of I^2, after a first step from zero
    for k in range(3):
        rows = torch.cat([(a * a.grad)[e * 3 + k] for e in range(4)]).detach()
        columns = torch.cat([(b * b.grad)[:, k * 4 + e] for e in range(4)]).detach()
        expected = {"gate": columns.sum() ** 2, "row": (rows**2).mean()}
        expected["column"] = (columns**2).mean()
        for part, value in expected.items():
            torch.testing.assert_close(terms[part][FIRST + DOWN][k], share * value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "ablation"}, "`score` is 'ablation'.*; use 'gradient' or 'shapley'"),
        ({"score": "screened"}, "`score` is 'screened'.*"),
        ({"score": "architecture"}, "`score` is 'architecture'.*"),
        ({"policy": "worth"}, "`policy` is 'worth'.*; use 'paper'"),
        ({"new_rows": "gradient"}, "`new_rows` is 'gradient'.*; use 'kaiming'"),
    ],
)
def test_what_reads_a_linear_layer_is_refused(options, words):
    config = AllocationConfig(ranks_per_round=1, **options)
    batches = [] if config.score == "architecture" else [tiny.causal_batch()]
    with pytest.raises(ValueError, match=words + r".*leave `target_parameters` out"):
        Allocator(adapted(), config, batches)
