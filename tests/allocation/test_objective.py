import pytest
import tiny
import torch
from transformers import BertForQuestionAnswering

from loralloc.allocation.objective import Objective, is_causal_lm


def assert_is_the_models_own_loss(model, batch):
    with torch.no_grad():
        own = float(model(**batch).loss)
    assert Objective(model, [batch]).mean_loss() == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("build", tiny.MODELS)
def test_is_the_models_own_loss(build):
    model = build()
    assert_is_the_models_own_loss(model, tiny.batch_for(model))


@pytest.mark.parametrize("build", tiny.MODELS)
@pytest.mark.parametrize("size", [1, 4, 6])
def test_every_target_weighs_the_same_however_the_batch_is_cut(build, size):
    model = build()
    batch = tiny.batch_for(model)
    whole = Objective(model, [batch]).mean_loss()
    assert Objective(model, tiny.micro_batches(batch, size)).mean_loss() == pytest.approx(
        whole, abs=1e-5
    )


def test_the_head_runs_at_supervised_positions_only():
    model, batch = tiny.llama(), tiny.causal_batch()
    rows = []
    model.lm_head.register_forward_hook(lambda *args: rows.append(args[2].shape[:-1].numel()))
    Objective(model, [batch]).mean_loss()
    assert rows == [int((batch["labels"][:, 1:] != tiny.IGNORED).sum())]


def test_the_first_token_is_predicted_by_nothing():
    model, batch = tiny.gpt2(), tiny.causal_batch(prompt_length=0)
    masked = batch["labels"].clone()
    masked[:, 0] = tiny.IGNORED
    with_first = Objective(model, [batch])
    without_first = Objective(model, [{**batch, "labels": masked}])
    assert with_first.num_targets == without_first.num_targets
    assert with_first.mean_loss() == without_first.mean_loss()


def test_examples_without_a_supervised_position_count_for_nothing():
    model, batch = tiny.llama(), tiny.causal_batch()
    empty = {**batch, "labels": torch.full_like(batch["labels"], tiny.IGNORED)}
    assert (
        Objective(model, [empty, batch, empty]).mean_loss() == Objective(model, [batch]).mean_loss()
    )


def test_no_supervised_position_at_all_is_refused():
    batch = tiny.causal_batch()
    empty = {**batch, "labels": torch.full_like(batch["labels"], tiny.IGNORED)}
    with pytest.raises(ValueError, match="no supervised position"):
        Objective(tiny.llama(), [empty])
    with pytest.raises(ValueError, match="no supervised position"):
        Objective(tiny.llama(), [])


def test_the_loss_is_float32_under_a_bfloat16_model():
    model = tiny.llama().bfloat16()
    loss = Objective(model, [tiny.causal_batch()]).loss_sum(tiny.causal_batch())
    assert loss.dtype == torch.float32


def test_evaluating_puts_every_modules_own_mode_back():
    model = tiny.llama()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with Objective(model, [tiny.causal_batch()]).evaluating():
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_span_prediction_is_the_models_own_loss():
    model = BertForQuestionAnswering(tiny.bert_classifier(num_labels=2).config).eval()
    batch = tiny.classification_batch()
    del batch["labels"]
    batch |= {"start_positions": torch.arange(6) % 3, "end_positions": torch.arange(6) % 2 + 1}
    assert Objective(model, [batch]).num_targets == 6
    assert_is_the_models_own_loss(model, batch)


def test_an_answer_that_was_cut_off_counts_for_nothing():
    model = BertForQuestionAnswering(tiny.bert_classifier(num_labels=2).config).eval()
    batch = tiny.classification_batch()
    del batch["labels"]
    batch |= {"start_positions": torch.arange(6), "end_positions": torch.arange(6)}
    whole = Objective(model, [batch]).losses(batch)
    past = torch.tensor([0, 1, 99, 3, 4, 12])  # of 12 tokens
    cut = Objective(model, [batch]).losses(
        {**batch, "start_positions": past, "end_positions": past}
    )
    torch.testing.assert_close(cut, whole * torch.tensor([1, 1, 0, 1, 1, 0]))


def test_losses_are_those_of_each_target():
    model, batch = tiny.llama(), tiny.causal_batch()
    losses = Objective(model, [batch]).losses(batch)
    supervised = batch["labels"][:, 1:] != tiny.IGNORED
    expected = torch.nn.functional.cross_entropy(
        model(**batch).logits[:, :-1][supervised],
        batch["labels"][:, 1:][supervised],
        reduction="none",
    )
    torch.testing.assert_close(losses, expected)


def test_regression_is_the_models_own_loss():
    model = tiny.bert_classifier(num_labels=1)
    batch = {**tiny.classification_batch(), "labels": torch.linspace(-1, 1, 6)}
    assert_is_the_models_own_loss(model, batch)


def test_an_encoder_and_decoder_is_not_a_causal_model():
    model = tiny.t5()
    assert not is_causal_lm(model)
    assert_is_the_models_own_loss(model, tiny.causal_batch())
