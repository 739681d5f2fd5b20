"""The supervised-position loss in a plain Trainer."""

import mixtures
import pytest
import tiny
import torch
import trainers
from transformers import Trainer
from waits import waits_of

from loralloc import use_supervised_loss


def gradients(trainer, batch, **options):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **options)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def mixture():
    return mixtures.adapted(mixtures.mixtral())


def one_expert():
    return tiny.adapted(tiny.llama(), r=2)


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("num_items", [None, torch.tensor(40)])
@pytest.mark.parametrize("build", [one_expert, mixture])
def test_loss_and_gradients_are_those_of_the_trainer(
    build, num_items, processes, tmp_path, monkeypatch
):
    trainer = trainers.causal_trainer(tmp_path, model=build())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    batch = tiny.causal_batch()
    expected = gradients(trainer, batch, num_items_in_batch=num_items)
    use_supervised_loss(trainer)
    got = gradients(trainer, batch, num_items_in_batch=num_items)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs)


def test_a_loss_of_ones_own_is_not_replaced(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    trainer.__class__ = OwnLoss
    with pytest.raises(ValueError, match="The trainer or its model has a loss of its own"):
        use_supervised_loss(trainer)


def test_a_step_waits_for_the_device_once(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    batch = tiny.causal_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own = waits_of(lambda: trainer.model(**inputs).logits.sum().backward())
    use_supervised_loss(trainer)
    for extra in (2, 1, 1):  # the first batch also shows what becomes of the logits
        options = dict(num_items_in_batch=torch.tensor(40))
        waits = waits_of(trainer.compute_loss, trainer.model, dict(batch), **options)
        assert len(waits) == len(own) + extra


def test_the_head_never_sees_a_prompt(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    use_supervised_loss(trainer)
    rows = []
    head = trainer.model.get_base_model().lm_head
    head.register_forward_hook(lambda *args: rows.append(args[2].shape[:-1].numel()))
    batch = tiny.causal_batch()
    trainer.compute_loss(trainer.model, dict(batch))
    assert rows == [int((batch["labels"][:, 1:] != tiny.IGNORED).sum())]


@pytest.mark.parametrize("build", [one_expert, mixture])
def test_training_gives_the_same_losses(build, tmp_path):
    losses = []
    for supervised in (False, True):
        trainer = trainers.causal_trainer(tmp_path, model=build(), gradient_accumulation_steps=2)
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


def test_a_compiled_model_is_refused(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    trainer.model.get_base_model().compile(backend="eager")
    with pytest.raises(TypeError, match=r"is compiled, head and all, .* leave `torch_compile` out"):
        use_supervised_loss(trainer)


def test_another_loss_is_refused(tmp_path):
    trainer = trainers.causal_trainer(tmp_path)
    trainer.compute_loss_func = lambda *_: None
    with pytest.raises(ValueError, match=r"has a loss of its own .*; leave it out"):
        use_supervised_loss(trainer)
