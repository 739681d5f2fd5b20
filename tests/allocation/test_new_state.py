"""What a new rank begins with in the optimiser's state."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_8_bits import QMAP_UNSIGNED, Adam8Bit, dequantised
from reference.new_ranks import adam, survivors_mean

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.layers import lora_layers, weight_a, weight_b
from loralloc.allocation.optimizer_state import check_optimizer
from loralloc.allocation.policy import Plan
from loralloc.allocation.resize import resize

NAME = "model.layers.0.mlp.down_proj"
KEPT, NUM_ADDED = (1, 2), 2
PLAN = Plan(kept={NAME: KEPT}, added={NAME: NUM_ADDED}, pruned={NAME: (0, 3)})

DIVIDES = {
    "adamw": (torch.optim.AdamW, {}, ["exp_avg_sq"]),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}, ["exp_avg_sq"]),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, ["exp_avg_sq", "max_exp_avg_sq"]),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, ["square_avg"]),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}, ["sum"]),
    "adadelta": (torch.optim.Adadelta, {}, ["square_avg", "acc_delta"]),
    "adamax": (torch.optim.Adamax, {}, ["exp_inf"]),
    "nadam": (torch.optim.NAdam, {}, ["exp_avg_sq"]),
    "rprop": (torch.optim.Rprop, {}, ["step_size"]),
}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def trained(make, **options):
    """A model, its optimiser after three steps on different batches, and a layer."""
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    optimizer = make(trainable(model), lr=1e-3, **options)
    for seed in range(3):
        tiny.train(model, tiny.batch_for(model, seed=seed), 1, optimizer)
    return model, optimizer, lora_layers(model)[NAME]


@pytest.mark.parametrize("case", list(DIVIDES.values()), ids=list(DIVIDES))
def test_what_updates_are_divided_by_begins_at_the_survivors_mean(case):
    make, options, keys = case
    model, optimizer, layer = trained(make, **options)
    before_a, before_b = (dict(optimizer.state[f(layer)]) for f in (weight_a, weight_b))
    resize(model, PLAN, optimizer=optimizer, new_state="survivors")
    after_a, after_b = (optimizer.state[f(layer)] for f in (weight_a, weight_b))
    for key in keys:
        expected_a = torch.tensor(survivors_mean(before_a[key].tolist(), list(KEPT)))
        expected_b = torch.tensor(survivors_mean(before_b[key].t().tolist(), list(KEPT)))
        for i in range(len(KEPT), len(KEPT) + NUM_ADDED):
            torch.testing.assert_close(after_a[key][i], expected_a)
            torch.testing.assert_close(after_b[key][:, i], expected_b)
        assert expected_a.any() and expected_b.any()
        assert torch.equal(after_a[key][: len(KEPT)], before_a[key][list(KEPT)])
    for key, value in after_a.items():
        if key not in (*keys, "step", "mu_product"):
            assert not value[len(KEPT) :].any(), key


def test_where_no_rank_of_a_module_stays_the_mean_is_over_all_it_had():
    model, optimizer, layer = trained(torch.optim.AdamW)
    before = optimizer.state[weight_b(layer)]["exp_avg_sq"].clone()
    plan = Plan(kept={NAME: ()}, added={NAME: 1}, pruned={NAME: (0, 1, 2, 3)})
    resize(model, plan, optimizer=optimizer, new_state="survivors")
    after = optimizer.state[weight_b(layer)]["exp_avg_sq"]
    torch.testing.assert_close(after, before.mean(dim=1, keepdim=True))


@given(
    num_steps=st.integers(50, 2000),
    elders=st.floats(1e-4, 1e2),
    signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=10, max_size=10),
)
@settings(max_examples=50, deadline=None)
def test_a_gradient_as_large_as_the_elders_moves_a_new_rank_no_further_than_lr(
    num_steps, elders, signs
):
    """The jolt: with zeros beside an old step count the same gradients move it several times lr."""
    v = elders**2 * (1 - 0.999**num_steps)  # of gradients of this size all along
    gradients = [sign * elders for sign in signs]
    fair = adam(gradients, v=v, step=num_steps)
    assert max(map(abs, fair)) <= 1 + 1e-3
    jolted = adam(gradients, step=num_steps)
    assert abs(jolted[0]) == pytest.approx(
        0.1 / (1 - 0.9 ** (num_steps + 1)) * ((1 - 0.999 ** (num_steps + 1)) / 1e-3) ** 0.5,
        rel=1e-2,
    )


def first_updates(new_state, num_steps=5):
    """Largest ratio over steps of how far new and old columns of B move, root mean square."""
    model = tiny.adapted(tiny.llama())
    optimizer = tiny.optimizer_for(model, lr=2e-3)
    batches = [tiny.batch_for(model, seed=seed) for seed in range(8)]
    for turn in range(40):
        tiny.train(model, batches[turn % 8], 1, optimizer)
    config = AllocationConfig(ranks_per_round=14, new_state=new_state)
    allocator = Allocator(model, config, [batches[0]])
    added = allocator.step(optimizer, step=40).added
    layers, ratios = lora_layers(model), []
    for turn in range(num_steps):
        before = {name: weight_b(layers[name]).detach().clone() for name in added}
        tiny.train(model, batches[turn], 1, optimizer)
        moved = {name: (weight_b(layers[name]).detach() - before[name]) ** 2 for name in added}
        young = torch.cat([moved[name][:, -n:].flatten() for name, n in added.items()]).mean()
        old = torch.cat([moved[name][:, :-n].flatten() for name, n in added.items()]).mean()
        ratios.append(float((young / old).sqrt()))
    return max(ratios)


def test_the_first_updates_of_new_ranks_are_no_larger_than_their_elders():
    assert first_updates("survivors") < 1.5
    assert first_updates("zero") > 1.5


# In 8 bits, as bitsandbytes keeps it.


def test_in_8_bits_too():
    model, optimizer, layer = trained(Adam8Bit)
    check_optimizer(optimizer, {NAME: (weight_a(layer), weight_b(layer))}, new_state="survivors")
    before = dequantised(optimizer.state[weight_a(layer)], 2)
    resize(model, PLAN, optimizer=optimizer, new_state="survivors")
    state = optimizer.state[weight_a(layer)]
    expected = before[list(KEPT)].mean(dim=0)
    tolerance = float(before.max()) * float((QMAP_UNSIGNED[1:] - QMAP_UNSIGNED[:-1]).max())
    torch.testing.assert_close(dequantised(state, 2)[2], expected, rtol=0, atol=tolerance)
    assert dequantised(state, 2)[2:].any()
    assert not dequantised(state, 1)[2:].any()


class RMSprop8Bit(torch.optim.Optimizer):
    """An optimiser of bitsandbytes with one state, which is a second moment."""

    optimizer_name = "rmsprop"

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("state1", torch.zeros_like(p))
                v.lerp_(p.grad**2, 0.01)
                p.sub_(group["lr"] * p.grad / (v.sqrt() + 1e-8))


def test_the_only_state_is_handed_on_where_it_is_a_second_moment():
    model, optimizer, layer = trained(RMSprop8Bit)
    before = optimizer.state[weight_a(layer)]["state1"].clone()
    resize(model, PLAN, optimizer=optimizer, new_state="survivors")
    after = optimizer.state[weight_a(layer)]["state1"]
    torch.testing.assert_close(after[2], before[list(KEPT)].mean(dim=0))


# What cannot take effect.


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_an_optimiser_without_second_moments_is_refused_at_the_start(options):
    model = tiny.adapted(tiny.llama())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, **options)
    config = AllocationConfig(new_state="survivors")
    allocator = Allocator(model, config, [tiny.batch_for(model)])
    with pytest.raises(TypeError, match=r"SGD keeps nothing of the size of gradients, so that"):
        allocator.check_optimizer(optimizer)
    tiny.train(model, tiny.batch_for(model), 1, optimizer)
    words = "would have no effect; leave it out, or use an optimiser"
    with pytest.raises(TypeError, match=words):
        allocator.check_optimizer(optimizer)
    if options:
        with pytest.raises(TypeError, match=words):
            resize(model, PLAN, optimizer=optimizer, new_state="survivors")


def test_survivors_without_an_optimiser_is_refused():
    model = tiny.adapted(tiny.llama())
    with pytest.raises(ValueError, match=r"there is no optimiser whose state.*`optimizer=`"):
        resize(model, PLAN, new_state="survivors")
    with pytest.raises(ValueError, match=r"`new_state` is 'old'; use one of 'zero', 'survivors'"):
        resize(model, PLAN, new_state="old")
