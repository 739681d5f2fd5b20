"""Blocks are skipped only where what they put out is all that the blocks after them read."""

import pytest
import rounding
import tiny
import torch
import transformers
from reference import importance as reference
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from loralloc.allocation.importance import ablation
from loralloc.allocation.importance.prefix import Prefix
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits

LIMITS = Limits(num_pruned=1)


def gemma(num_shared):
    """The last blocks read the keys and values of earlier ones, from a dictionary."""
    config = Gemma4TextConfig(
        vocab_size=tiny.VOCABULARY,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=num_shared,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        max_position_embeddings=64,
        pad_token_id=tiny.PADDING,
        initializer_range=0.15,
    )
    with tiny.seeded(0):
        model = Gemma4ForCausalLM(config).eval()
    targets = ["q_proj", "v_proj", "up_proj"]
    model = tiny.adapted(model, r=2, target_modules=targets, task_type="CAUSAL_LM")
    return tiny.with_trained_b(model, 0.3)


def blocks_computed(model, run):
    """How often a block computes: inside a skipped one, no hook fires."""
    computed = []
    handles = [
        block.mlp.register_forward_hook(lambda *_: computed.append(1))
        for block in model.get_base_model().model.layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return len(computed)


def exact(model, batch, **options):
    objective = Objective(model, [batch], **options)
    return ablation.score(objective, weights_b(lora_layers(model)), LIMITS)


def assert_equals_paper(model, batch, scores):
    paper = reference.ablation(model, batch)
    close = dict(rtol=0, atol=rounding.of_losses(model, paper.s_base, paper.s_full))
    for name in paper.s_without:
        without, only = paper.s_full - paper.s_without[name], paper.s_only[name] - paper.s_base
        torch.testing.assert_close(scores.terms["without"][name].float(), without, **close)
        torch.testing.assert_close(scores.terms["only"][name].float(), only, **close)


@pytest.mark.parametrize("num_shared", [0, 2])
def test_scores_of_a_model_whose_blocks_share_keys_and_values(num_shared):
    model, batch = gemma(num_shared), tiny.causal_batch()
    found = []
    count = blocks_computed(model, lambda: found.append(exact(model, batch)))
    assert_equals_paper(model, batch, found[0])
    passes = 2 * (1 + sum(b.shape[1] for b in weights_b(lora_layers(model)).values()))
    if transformers.__version__ >= "5.21":  # before, every block of Gemma 4 is given the dictionary
        assert (count == 4 * passes) is bool(num_shared)


def test_a_loss_that_compares_two_passes_is_measured_by_whole_passes():
    """As a preference's: with the adapter, and with the adapter off."""
    model, batch = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2), 0.3), tiny.causal_batch()

    def margin(inputs):
        with torch.no_grad(), model.disable_adapter():
            base = model(**inputs).loss
        return torch.nn.functional.softplus(model(**inputs).loss - base)

    scores = exact(model, batch, loss=margin)
    name = "model.layers.1.mlp.up_proj"
    b = weights_b(lora_layers(model))[name]
    with torch.no_grad():
        full = float(margin(batch))
        column = b[:, 1].clone()
        b[:, 1] = 0
        without = float(margin(batch))
        b[:, 1] = column
    expected = without - full
    atol = rounding.of_losses(model, 4.0)
    assert float(scores.terms["without"][name][1]) == pytest.approx(expected, rel=0, abs=atol)
    assert abs(expected) > 100 * atol


def test_a_given_loss_of_one_pass_begins_at_the_ablated_block():
    model, batch = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=1), 0.3), tiny.causal_batch()
    found = []
    count = blocks_computed(
        model,
        lambda: found.append(exact(model, batch, loss=lambda b: model(**b, use_cache=False).loss)),
    )
    assert_equals_paper(model, batch, found[0])
    assert count == 2 * (2 + 7 * 2 + 7 * 1)


def test_a_cache_that_blocks_fill_is_not_left_out():
    model, batch = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=1), 0.3), tiny.causal_batch()
    assert_equals_paper(
        model, batch, exact(model, batch, loss=lambda b: model(**b, use_cache=True).loss)
    )


def test_each_skipped_block_gives_back_its_own_output():
    model = tiny.adapted(tiny.llama(num_hidden_layers=3), r=1)
    prefix = Prefix(model, lora_layers(model))
    batch = tiny.causal_batch()
    with torch.no_grad():
        with prefix.recording() as recording:
            model(**batch)
        seen = []
        for block in model.get_base_model().model.layers:
            block.register_forward_hook(lambda *args: seen.append(args[2]))
        with prefix.replaying(recording, before=2):
            model(**batch)
    assert all(torch.equal(seen[i], recording.outputs[i]) for i in range(3))
    assert not torch.equal(seen[0], seen[1])
