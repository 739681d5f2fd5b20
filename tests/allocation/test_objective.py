import pytest
import rounding
import tiny
import torch
from transformers import BertForQuestionAnswering, BertForSequenceClassification

from loralloc.allocation.objective import Objective, is_causal_lm


def assert_is_the_models_own_loss(model, batch):
    with torch.no_grad():
        own = float(model(**batch).loss)
    atol = rounding.of_losses(model, own)
    assert Objective(model, [batch]).mean_loss() == pytest.approx(own, abs=atol)


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
        whole, abs=rounding.of_losses(model, whole)
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


class Perceptron(torch.nn.Module):
    """A module of a user's own: no configuration, a dict for its outputs."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x, labels):
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Weighted(BertForSequenceClassification):
    """A model of Transformers whose loss is the user's."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        weight = torch.tensor([9.0, 1.0, 0.1])
        outputs.loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return outputs


def test_a_plain_module_is_measured_by_its_own_loss():
    with tiny.seeded(0):
        model = Perceptron()
        batch = {"x": torch.randn(6, 8), "labels": torch.arange(6) % 3}
    assert Objective(model, [batch]).num_targets == 6
    expected = float(model(**batch)["loss"].detach())
    assert Objective(model, [batch]).mean_loss() == pytest.approx(expected)


@pytest.mark.parametrize("build", [tiny.bert_classifier, tiny.roberta_classifier])
def test_outputs_that_are_a_tuple(build):
    model = build()
    expected = Objective(model, [tiny.batch_for(model)]).mean_loss()
    model.config.return_dict = False
    found = Objective(model, [tiny.batch_for(model)]).mean_loss()
    assert found == pytest.approx(expected, abs=rounding.of_losses(model, expected))


def test_a_users_loss_in_a_model_of_transformers_is_taken():
    model, plain = Weighted(tiny.bert_classifier().config).eval(), tiny.bert_classifier()
    model.load_state_dict(plain.state_dict())
    batch = tiny.classification_batch()
    assert_is_the_models_own_loss(model, batch)
    own, usual = (Objective(m, [batch]).mean_loss() for m in (model, plain))
    assert abs(own - usual) > 1e-2


def test_a_loss_function_that_was_set_is_taken():
    model, batch = tiny.llama(), tiny.causal_batch()
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    assert_is_the_models_own_loss(model, batch)


def test_whole_numbers_are_targets_of_a_regression_where_the_model_puts_out_one_number():
    model = tiny.bert_classifier(num_labels=1)
    batch = {**tiny.classification_batch(), "labels": torch.arange(6) % 5}
    assert_is_the_models_own_loss(model, batch)


def test_whole_numbers_are_targets_of_a_regression_where_the_model_is_told_so():
    model = tiny.bert_classifier(num_labels=3, problem_type="regression")
    batch = {**tiny.classification_batch(), "labels": torch.arange(18).view(6, 3) % 5}
    assert_is_the_models_own_loss(model, batch)


def test_a_given_loss_stands_in_for_the_models():
    model, batch = tiny.llama(), tiny.causal_batch()
    batches = tiny.micro_batches(batch, 4)
    objective = Objective(model, batches, loss=lambda b: b["input_ids"].double().mean())
    counts = [int((b["labels"][:, 1:] != tiny.IGNORED).sum()) for b in batches]
    means = [float(b["input_ids"].double().mean()) for b in batches]
    expected = sum(c * m for c, m in zip(counts, means, strict=True)) / sum(counts)
    assert objective.mean_loss() == pytest.approx(expected)


@pytest.mark.parametrize(
    "batch",
    [
        {"chosen": torch.zeros(5, 3)},
        (torch.zeros(5, 3), 1),
        {"scale": torch.tensor(1.0), "x": torch.zeros(5)},
    ],
)
def test_targets_are_examples_where_a_given_loss_reads_no_labels(batch):
    objective = Objective(tiny.llama(), [batch, batch], loss=lambda _: torch.tensor(2.0))
    assert objective.num_targets == 10
    assert objective.mean_loss() == 2.0


def test_a_batch_without_labels_is_refused():
    batch = tiny.causal_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="has no `labels`, only input_ids, attention_mask"):
        Objective(tiny.llama(), [batch])
    with pytest.raises(ValueError, match="no loss for a scoring batch of input_ids"):
        Objective(tiny.bert_classifier(), [batch])
