"""The supervised-position loss in a plain Trainer."""

import pytest
import tiny
import torch
import trainers

from loralloc import use_supervised_loss


def gradients(trainer, batch, **options):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **options)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("num_items", [None, torch.tensor(40)])
def test_loss_and_gradients_are_those_of_the_model(num_items, tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    batch = tiny.causal_batch()
    expected = gradients(trainer, batch, num_items_in_batch=num_items)
    use_supervised_loss(trainer)
    got = gradients(trainer, batch, num_items_in_batch=num_items)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_head_never_sees_a_prompt(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    use_supervised_loss(trainer)
    rows = []
    head = trainer.model.get_base_model().lm_head
    head.register_forward_hook(lambda *args: rows.append(args[2].shape[:-1].numel()))
    batch = tiny.causal_batch()
    trainer.compute_loss(trainer.model, dict(batch))
    assert rows == [int((batch["labels"][:, 1:] != tiny.IGNORED).sum())]


def test_training_gives_the_same_losses(tmp_path):
    losses = []
    for supervised in (False, True):
        trainer = trainers.causal_trainer(tmp_path, gradient_accumulation_steps=2)
        if supervised:
            use_supervised_loss(trainer)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_evaluation_has_its_outputs(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    use_supervised_loss(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_classifier_is_refused(tmp_path):
    with pytest.raises(TypeError, match="BertForSequenceClassification; a loss at supervised"):
        use_supervised_loss(trainers.classification_trainer(tmp_path))


def test_another_loss_is_refused(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    trainer.compute_loss_func = lambda *_: None
    with pytest.raises(ValueError, match="a loss of its own; leave it out"):
        use_supervised_loss(trainer)
