"""Scoring keeps no more than a training step: with checkpointing, what the layers read."""

import pytest
import tiny
import torch
from transformers import OPTConfig, OPTForCausalLM

from loralloc.allocation.importance import ablation, gradient
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective, can_be_kept, checkpointing_kept
from loralloc.allocation.policy import Limits

LIMITS = Limits(num_pruned=1)


def opt(**dropout):
    """Its blocks drop out by their own training flag, not by a module's."""
    options = dict(word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, init_std=0.15)
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=32, num_attention_heads=4)
    with tiny.seeded(0):
        return OPTForCausalLM(OPTConfig(**sizes, **options, **dropout, pad_token_id=tiny.PADDING))


def adapted(build, **options):
    model = build() if callable(build) else build
    if isinstance(model, OPTForCausalLM):
        options |= dict(target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    return tiny.with_trained_b(tiny.adapted(model, r=2, **options))


BUILDS = (tiny.llama, tiny.gpt2, tiny.bert_classifier, tiny.t5, opt)


def bytes_kept(run):
    """Of the distinct tensors that are kept for the backward pass while this runs."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept)


def score(model, batch):
    return gradient.score(Objective(model, [batch]), weights_b(lora_layers(model)), LIMITS)


@pytest.mark.parametrize("build", BUILDS)
def test_scoring_keeps_no_more_than_a_training_step(build):
    model = tiny.checkpointing(adapted(build)).train()
    batch = tiny.batch_for(model)
    objective = Objective(model, [batch])

    def train():
        model(**batch).loss.backward()

    def measure():
        with objective.evaluating():
            torch.autograd.grad(
                objective.loss_sum(batch), list(weights_b(lora_layers(model)).values())
            )

    step = bytes_kept(train)
    scoring = bytes_kept(measure)
    # A classifier's own loss is computed beside those of its examples: some hundred bytes.
    assert 0 < scoring < 1.01 * step


@pytest.mark.parametrize("build", BUILDS)
def test_scores_are_those_without_checkpointing(build):
    plain = adapted(build)
    batch = tiny.batch_for(plain)
    expected = score(plain, batch)
    scores = score(tiny.checkpointing(adapted(build)).train(), batch)
    assert (scores.s_full, scores.s_base) == (expected.s_full, expected.s_base)
    for term, by_module in expected.terms.items():
        torch.testing.assert_close(scores.terms[term], by_module)


@pytest.mark.parametrize(
    "build",
    [lambda: opt(dropout=0.5), lambda: tiny.gpt2(resid_pdrop=0.5, attn_pdrop=0.5)],
    ids=["opt", "gpt2"],
)
def test_dropout_stays_off(build):
    model = tiny.checkpointing(adapted(build, lora_dropout=0.5)).train()
    batch = tiny.batch_for(model)
    first, second = score(model, batch), score(model, batch)
    assert first.s_full == second.s_full
    assert all(torch.equal(x, second.importance[name]) for name, x in first.importance.items())


def test_a_cache_is_not_filled_twice():
    model = adapted(tiny.llama)
    batch = tiny.batch_for(model)
    expected = torch.autograd.grad(
        model(**batch).loss, list(weights_b(lora_layers(model)).values())
    )
    tiny.checkpointing(model)
    with checkpointing_kept(model):
        loss = model(**batch, use_cache=True).loss
        found = torch.autograd.grad(loss, list(weights_b(lora_layers(model)).values()))
    torch.testing.assert_close(found, expected)


def test_layers_compute_once_where_there_is_no_graph():
    model = tiny.checkpointing(adapted(tiny.llama)).train()
    batch, runs = tiny.batch_for(model), []
    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    objective = Objective(model, [batch])
    with objective.evaluating():
        objective.mean_loss()
    assert len(runs) == 2
    score(model, batch)
    assert len(runs) == 2 + 2 * 2 * 2  # twice forward, and again backward


def test_reentrant_checkpointing_rests():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(), r=2))
    expected = score(model, tiny.causal_batch())
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    scores = score(model.train(), tiny.causal_batch())
    assert all(torch.equal(x, scores.importance[name]) for name, x in expected.importance.items())


def test_forwards_are_put_back_and_a_users_own_among_them():
    model = tiny.checkpointing(adapted(tiny.llama)).train()
    first, second = model.get_base_model().model.layers
    own = first.forward

    def patched(*args, **kwargs):
        return own(*args, **kwargs)

    first.forward = patched
    objective = Objective(model, [tiny.causal_batch()])
    ablation.score(objective, weights_b(lora_layers(model)), LIMITS)
    score(model, tiny.causal_batch())
    assert first.forward is patched
    assert "forward" not in vars(second)


def test_which_models_can_keep_it():
    assert all(can_be_kept(build()) for build in BUILDS)
    assert not can_be_kept(torch.nn.Sequential(torch.nn.Linear(2, 2)))
