"""The loss at supervised positions is the model's own, whatever becomes of its logits."""

import pytest
import tiny
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)
from waits import Waits, waits_of

from loralloc.allocation.supervised import IGNORED, SupervisedLoss, supervised_logits
from loralloc.kernels import cross_entropy

SIZES = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=tiny.PADDING,
    bos_token_id=1,
    eos_token_id=2,
)


def gemma2(**overrides):
    """Caps its logits."""
    config = Gemma2Config(**SIZES, head_dim=8, **{"final_logit_softcapping": 5.0, **overrides})
    return tiny._build(Gemma2ForCausalLM, config)


def granite():
    """Divides its logits."""
    return tiny._build(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=3.0))


def cohere():
    """Multiplies its logits."""
    return tiny._build(CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25))


def untied():
    return tiny.llama(tie_word_embeddings=False)


def tied():
    return tiny.llama(tie_word_embeddings=True)


PASS_ON = (untied, tied, tiny.gpt2)
ACT_ON = (gemma2, granite, cohere)


def adapted(model, **options):
    targets = dict(target_modules=tiny.LLAMA_TARGETS, task_type="CAUSAL_LM")
    options = options if isinstance(model, type(tiny.gpt2())) else {**targets, **options}
    return tiny.with_trained_b(tiny.adapted(model, **options))


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_is_the_models_own(model, loss, batch=None):
    batch = batch or tiny.causal_batch()
    model.zero_grad()
    own = model(**batch).loss
    own.backward()
    expected = gradients(model)
    model.zero_grad()
    got = loss(batch)
    (got.total / got.num_targets).backward()
    torch.testing.assert_close(got.total / got.num_targets, own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-6)
    targets = batch["labels"][:, 1:]
    right = (model(**batch).logits[:, :-1].argmax(-1) == targets)[targets != IGNORED]
    assert (got.num_targets, int(got.correct)) == (right.numel(), int(right.sum()))


@pytest.mark.parametrize("is_bounded", [True, False])
@pytest.mark.parametrize("build", (*PASS_ON, *ACT_ON))
def test_value_and_gradient_are_the_models_own(build, is_bounded):
    model = adapted(build())
    loss = SupervisedLoss(model)
    if not is_bounded:
        model.get_output_embeddings().requires_grad_(True)  # has to be computed in one piece
    for seed in range(2):  # the first batch also shows what becomes of the logits
        assert_is_the_models_own(model, loss, tiny.causal_batch(seed=seed))
    assert loss.is_bounded(tiny.causal_batch()) is (is_bounded and build in PASS_ON)


def test_of_a_model_that_is_not_adapted():
    model = tiny.llama().requires_grad_(False)
    batch, loss = tiny.causal_batch(), SupervisedLoss(model)
    with torch.no_grad():
        got = loss(batch)
        torch.testing.assert_close(got.total / got.num_targets, model(**batch).loss)
    assert loss.is_bounded(batch) and not got.total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_the_first_logits_are_too_small_to_feel_is_seen(dtype):
    model = gemma2(final_logit_softcapping=30.0).to(dtype).requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    loss = SupervisedLoss(model)
    assert not loss.is_bounded(tiny.causal_batch())


def test_a_head_of_zeros_shows_what_becomes_of_its_logits_too():
    model = granite().requires_grad_(False)
    model.lm_head.weight = nn.Parameter(torch.zeros(tiny.VOCABULARY, 32), requires_grad=False)
    loss = SupervisedLoss(model)
    assert not loss.is_bounded(tiny.causal_batch())


@pytest.mark.parametrize("build", [tiny.llama, gemma2])
def test_no_supervised_token(build):
    model, batch = adapted(build()), tiny.causal_batch()
    loss = SupervisedLoss(model)
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    got = loss(empty)
    got.total.backward()
    assert (float(got.total.detach()), got.num_targets, int(got.correct)) == (0, 0, 0)
    assert not any(gradient.any() for gradient in gradients(model).values())
    assert_is_the_models_own(model, loss)  # nothing wrong was learnt from it


def test_a_head_that_trains_gets_its_gradient():
    model = adapted(untied(), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    loss = SupervisedLoss(model)
    assert_is_the_models_own(model, loss)
    assert head.weight.grad.any() and not loss.is_bounded(tiny.causal_batch())


def test_a_head_with_an_adapter_gets_its_gradient():
    model = adapted(untied(), target_modules=["q_proj", "lm_head"])
    loss = SupervisedLoss(model)
    assert_is_the_models_own(model, loss)
    assert any("lm_head" in name for name in gradients(model)) and not loss.is_bounded(
        tiny.causal_batch()
    )


def test_a_head_that_begins_to_train_later_gets_its_gradient():
    model = adapted(untied())
    loss = SupervisedLoss(model)
    assert_is_the_models_own(model, loss)
    model.get_output_embeddings().weight.requires_grad_(True)
    assert_is_the_models_own(model, loss)
    assert "base_model.model.lm_head.weight" in gradients(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hooked_head_is_called(when):
    model = adapted(untied())
    loss = SupervisedLoss(model)
    if when == "after":
        assert_is_the_models_own(model, loss)
    rows = []

    def double(_module, _args, output):
        rows.append(output.shape[:-1].numel())
        return 2 * output

    model.get_output_embeddings().register_forward_hook(double)
    assert_is_the_models_own(model, loss)
    num_targets = int((tiny.causal_batch()["labels"][:, 1:] != IGNORED).sum())
    assert num_targets in rows  # our pass is at supervised positions only


@pytest.mark.parametrize(("build", "passes"), [(tiny.llama, [1, 1, 1]), (gemma2, [2, 1, 1])])
def test_what_becomes_of_the_logits_is_looked_at_once(build, passes):
    model = adapted(build())
    loss, count = SupervisedLoss(model), []
    model.get_base_model().register_forward_pre_hook(lambda *_: count.append(1))
    for expected in passes:
        count.clear()
        loss(tiny.causal_batch())
        assert len(count) == expected


@pytest.mark.parametrize("trains", [False, True])
def test_an_error_within_the_model_leaves_nothing_behind(trains):
    model = adapted(untied())
    head = model.get_output_embeddings().requires_grad_(trains)
    words = r"reads \(6, 12\) .* `labels` has the shape \(6, 99\); give one label for each"
    with pytest.raises(ValueError, match=words):
        SupervisedLoss(model)({**tiny.causal_batch(), "labels": torch.zeros(6, 99)})
    assert not head._forward_hooks and not head._forward_pre_hooks and "forward" not in vars(head)


@pytest.mark.parametrize("build", [untied, gemma2])
def test_of_equal_logits_the_first_is_the_answer_whatever_the_way(build):
    model = adapted(build())
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    batch = tiny.causal_batch()
    batch["labels"][0, 6:8] = 0
    loss = SupervisedLoss(model)
    for _ in range(2):  # the first batch also shows what becomes of the logits
        assert int(loss(batch).correct) == 2


@pytest.mark.parametrize("build", [untied, gemma2])
def test_once_what_becomes_of_the_logits_is_known_the_device_is_waited_for_once(build):
    model, batch = adapted(build()), tiny.causal_batch()
    loss = SupervisedLoss(model)
    loss(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own = waits_of(lambda: model(**inputs).logits.sum().backward())
    with Waits() as waits, NewVectors(tiny.VOCABULARY) as vectors:
        loss(batch).mean.backward()
    assert len(waits.seen) == len(own) + 1  # for the number of supervised positions
    if build is untied:
        assert vectors.count == 0


class NewVectors(TorchDispatchMode):
    """How many tensors as long as the vocabulary were made outside of the head's chunks."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not function.is_view:
            self.count += tuple(output.shape) in {(self.vocabulary,), (1, 1, self.vocabulary)}
        return output


def test_logits_at_supervised_positions_are_the_models_own():
    model, batch = gemma2(), tiny.causal_batch()
    logits, targets = supervised_logits(model, batch)
    supervised = batch["labels"][:, 1:] != IGNORED
    torch.testing.assert_close(logits, model(**batch).logits[:, :-1][supervised])
    torch.testing.assert_close(targets, batch["labels"][:, 1:][supervised])


@pytest.fixture
def process_group():
    """This process alone, as one of several would find itself."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("build", [untied, gemma2])
def test_a_wrapper_that_looks_for_unused_parameters_finds_none(build, process_group):
    model, batch = adapted(build()), tiny.causal_batch()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss = SupervisedLoss(model)
    model(**batch).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    for _ in range(2):  # the first batch also shows what becomes of the logits
        model.zero_grad()
        loss(batch, through=wrapped).mean.backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-6)


class MostRows(TorchDispatchMode):
    """Rows of logits in the largest tensor of them that was made."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                is_weight = function.is_view  # transposed
                self.rows = max(self.rows, 0 if is_weight else tensor.shape[:-1].numel())
        return output


def test_logits_are_never_held_at_once(monkeypatch):
    vocabulary, at_once = 500, 4
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", {"cpu": at_once * vocabulary})
    model = adapted(tiny.llama(vocab_size=vocabulary))
    batch, loss = tiny.causal_batch(prompt_length=1), SupervisedLoss(model)
    held = []
    for _ in range(2):  # the first batch also shows what becomes of the logits
        with MostRows(vocabulary) as most:
            got = loss(batch)
            got.total.backward()
        held.append(most.rows)
    with MostRows(vocabulary) as most:
        supervised_logits(model, batch)
    assert held == [at_once, at_once]
    assert most.rows == got.num_targets > 10 * at_once


@pytest.mark.parametrize(("build", "expected"), [(tiny.llama, True), (gemma2, False)])
def test_one_example_tells_whether_memory_is_bounded(build, expected):
    model, examples = adapted(build()), []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: examples.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    loss = SupervisedLoss(model)
    batch = tiny.causal_batch()
    assert loss.is_bounded(batch) is loss.is_bounded(batch) is expected
    assert set(examples) == {1}


@pytest.mark.parametrize("asks_first", [False, True])
@pytest.mark.parametrize("build", [tiny.llama, gemma2])
def test_what_is_asked_of_the_first_batch_draws_no_random_number_of_training(build, asks_first):
    """A run that is resumed asks again, and must draw what the one that went on has drawn."""
    model = build(attention_dropout=0.5).train()
    batch = tiny.batch_for(model)
    loss = SupervisedLoss(model)
    states = []
    for _ in range(2):
        with tiny.seeded(3):
            if asks_first:
                loss.is_bounded(batch)
            loss(batch)
            states.append(torch.get_rng_state())
    assert states[0].equal(states[1])
