"""The loss that a method's search follows is the model's own."""

import mixtures
import pytest
import tiny
import torch
import trainers

from loralloc import get_method
from loralloc.training.loss import mean_loss


@pytest.mark.parametrize("build", [mixtures.mixtral, tiny.llama, tiny.bert_classifier])
def test_a_search_follows_the_loss_of_the_model_router_and_all(build, tmp_path):
    model = build()
    trainer, batch = trainers.causal_trainer(tmp_path, model=model), tiny.batch_for(model)
    loss = mean_loss(trainer, get_method("lora")())
    torch.testing.assert_close(loss(batch), model(**batch).loss)
