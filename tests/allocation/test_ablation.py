import pytest
import rounding
import tiny
import torch
from reference import importance as reference

from loralloc.allocation.importance import ablation
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits

ANY = Limits(num_pruned=1)


def measured(model, batches):
    return ablation.score(Objective(model, batches), weights_b(lora_layers(model)), ANY)


def assert_equals_paper(model, scores, paper):
    """To float32 rounding of the losses, of which every number is a difference."""
    close = dict(rtol=0, atol=rounding.of_losses(model, paper.s_base, paper.s_full))
    assert scores.s_full == pytest.approx(paper.s_full, abs=close["atol"])
    assert scores.s_base == pytest.approx(paper.s_base, abs=close["atol"])
    assert list(scores.terms["without"]) == list(scores.terms["only"]) == list(paper.s_without)
    for name in paper.s_without:
        without, only = paper.s_full - paper.s_without[name], paper.s_only[name] - paper.s_base
        torch.testing.assert_close(scores.terms["without"][name].float(), without, **close)
        torch.testing.assert_close(scores.terms["only"][name].float(), only, **close)


@pytest.mark.parametrize(
    "build",
    [
        *(tiny.llama, tiny.gpt2, tiny.bert_classifier),
        pytest.param(tiny.roberta_classifier, marks=pytest.mark.slow),
    ],
)
def test_equals_two_forward_passes_a_rank(build):
    model = tiny.with_trained_b(tiny.adapted(build(), r=2))
    batch = tiny.batch_for(model)
    paper = reference.ablation(model, batch)
    for size in (1, 4, 6):
        assert_equals_paper(model, measured(model, tiny.micro_batches(batch, size)), paper)


@pytest.mark.parametrize(
    ("build", "outside"), [(tiny.llama, "lm_head"), (tiny.bert_classifier, "pooler.dense")]
)
def test_equals_the_paper_with_adapters_outside_the_blocks(build, outside):
    targets = ["q_proj", "query", "down_proj", "output.dense", outside]
    model = tiny.with_trained_b(tiny.adapted(build(), r=2, target_modules=targets))
    batch = tiny.batch_for(model)
    assert any(name.endswith(outside) for name in lora_layers(model))
    assert_equals_paper(
        model, measured(model, tiny.micro_batches(batch, 4)), reference.ablation(model, batch)
    )


def test_equals_the_paper_where_blocks_lie_in_two_lists():
    model = tiny.with_trained_b(tiny.adapted(tiny.t5(), r=2), scale=0.5)
    batch = tiny.batch_for(model)
    assert_equals_paper(
        model, measured(model, tiny.micro_batches(batch, 4)), reference.ablation(model, batch)
    )


def test_equals_the_paper_with_unequal_ranks_and_rslora():
    pattern = {r"layers\.0.*q_proj": 1, "down_proj": 5}
    model = tiny.adapted(tiny.llama(), r=2, lora_alpha=3, use_rslora=True, rank_pattern=pattern)
    tiny.with_trained_b(model)
    batch = tiny.batch_for(model)
    assert_equals_paper(model, measured(model, [batch]), reference.ablation(model, batch))


def test_a_rank_that_does_nothing_has_no_importance():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2))
    layers = lora_layers(model)
    name = list(layers)[9]
    with torch.no_grad():
        weights_b(layers)[name][:, 1] = 0
    scores = measured(model, tiny.micro_batches(tiny.batch_for(model), 4))
    nothing = rounding.of_losses(model, scores.s_full, scores.s_base)
    assert abs(float(scores.terms["without"][name][1])) < nothing
    assert abs(float(scores.terms["only"][name][1])) < nothing


def test_only_the_wanted_ranks_are_measured():
    model = tiny.with_trained_b(tiny.adapted(tiny.gpt2(), r=3))
    weights = weights_b(lora_layers(model))
    objective = Objective(model, [tiny.batch_for(model)])
    name = list(weights)[5]
    everything = ablation.score(objective, weights, ANY)
    some = ablation.measure(objective, weights, {name: (0, 2)})
    assert some.verified == {name: (0, 2)}
    for term, measured_ranks in some.terms.items():
        expected = everything.terms[term][name][[0, 2]]
        atol = rounding.of_losses(model, some.s_full, some.s_base)
        torch.testing.assert_close(measured_ranks[name][[0, 2]], expected, rtol=0, atol=atol)
    assert sum(int(term.isfinite().sum()) for term in some.importance.values()) == 2


def test_every_ablation_starts_at_its_own_block():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(num_hidden_layers=4), r=2))
    # A hook on a block fires even when its computation is skipped; on its inside it does not.
    computed = [0] * 4
    blocks = model.get_base_model().model.layers
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: computed.__setitem__(i, computed[i] + 1))
        for i, block in enumerate(blocks)
    ]
    measured(model, tiny.micro_batches(tiny.batch_for(model), 3))
    for handle in handles:
        handle.remove()
    ranks_per_block, num_batches = 7 * 2, 2
    # Once for all ranks, then once for every rank of this block and of those before it.
    assert computed == [2 * num_batches * (1 + ranks_per_block * (block + 1)) for block in range(4)]


def test_half_the_blocks_of_whole_forward_passes_are_computed_at_most():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(num_hidden_layers=6), r=1))
    batch, count = tiny.batch_for(model), [0]
    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    measured(model, [batch])
    shared, count[0] = count[0], 0
    reference.ablation(model, batch)
    assert shared / count[0] < 0.6  # (6 + 1) / (2 * 6), and the two passes for all ranks


def test_no_patch_and_no_hook_is_left_behind():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=1))
    measured(model, [tiny.batch_for(model)])
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_forward_that_someone_else_patched_is_put_back():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=1))
    block = model.get_base_model().model.layers[0]
    own = block.forward

    def patched(*args, **kwargs):
        return own(*args, **kwargs)

    block.forward = patched
    measured(model, [tiny.batch_for(model)])
    assert block.forward is patched
