"""The loss at supervised positions of a mixture of experts holds its router's."""

import mixtures
import pytest
import tiny
import torch

from loralloc.allocation.supervised import SupervisedLoss


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("build", [mixtures.mixtral, mixtures.qwen3_moe, mixtures.jetmoe])
def test_the_mean_is_the_loss_of_the_model_router_and_all(build, head_trains):
    model = mixtures.adapted(build())
    model.get_output_embeddings().requires_grad_(head_trains)
    batch, loss = tiny.causal_batch(), SupervisedLoss(model)
    expected = loss_and_gradients(model, model(**batch).loss)
    for _ in range(2):  # the first batch also shows what becomes of the logits
        found = loss(batch)
        got = loss_and_gradients(model, found.mean)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert found.router.detach() > 0.1


def test_a_router_that_is_left_alone_adds_nothing():
    model = mixtures.adapted(mixtures.mixtral(output_router_logits=False))
    batch = tiny.causal_batch()
    found = SupervisedLoss(model)(batch)
    assert found.router is None
    torch.testing.assert_close(found.mean, model(**batch).loss)


def test_a_router_loss_without_a_weight_is_refused(monkeypatch):
    model = mixtures.adapted(mixtures.mixtral())
    base = model.get_base_model()
    del base.router_aux_loss_coef, base.config.router_aux_loss_coef
    monkeypatch.delattr(type(base.config), "router_aux_loss_coef")  # its default
    words = "MixtralForCausalLM have an `aux_loss`, .* set one, or `output_router_logits` to False"
    with pytest.raises(ValueError, match=words):
        SupervisedLoss(model)(tiny.causal_batch())
