"""SPT: what prompts are made from, where they stand, and the search for their layers."""

import pytest
import session
import tiny
import torch
from peft import TaskType
from reference.prompts import adaptive_pool, generate_prompts
from session import BUILDS, Drive, logits, prepared
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
)

from loralloc.allocation.blocks import backbone, blocks
from loralloc.methods.spt.generator import PromptGenerator
from loralloc.methods.spt.method import Spt, evenly_spaced
from loralloc.methods.spt.search import shared_gates
from loralloc.methods.spt.slots import pooling

DEEP = {
    "llama": lambda: tiny.llama(num_hidden_layers=4),
    "gpt2": lambda: tiny.gpt2(n_layer=4),
    "roberta": lambda: tiny.roberta_classifier(num_hidden_layers=4),
}
DECODERS = ("llama", "gpt2")


def fixed(shape: str, **options):
    """A method with generators before blocks 1 and 3 of 4, which says something."""
    options = {"bottleneck": 8, "prompt_length": 3, "layers": [1, 3], **options}
    return prepared(Spt(**options), DEEP[shape]())


def prompts_of(method, batch, *, training: bool = False):
    """What every generator makes in one pass, watched as a run does."""
    found = []
    handles = [
        module.register_forward_hook(lambda _, args, output: found.append(output.detach()))
        for module in method.model.modules()
        if isinstance(module, PromptGenerator)
    ]
    method.model.train(training)
    method.watch(batch)
    method.model(**batch)
    for handle in handles:
        handle.remove()
    return found


# Pooling


@pytest.mark.parametrize("num_slots", [1, 3, 10])
def test_pooling_is_adaptive_average_pooling_over_the_instruction(num_slots):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 14, 5, generator=generator)
    instruction = torch.zeros(9, 14, dtype=torch.bool)
    for row, (start, end) in enumerate(
        [(0, 14), (0, 1), (13, 14), (2, 9), (5, 14), (0, 10), (3, 3), (0, 7), (1, 12)]
    ):
        instruction[row, start:end] = True
    found = pooling(instruction, num_slots) @ hidden
    for row in range(9):
        expected = adaptive_pool(hidden[row, instruction[row]], num_slots)
        torch.testing.assert_close(found[row], expected)


def test_the_reference_pools_as_torch_does():
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool1d(hidden.T[None], 4)[0].T
    torch.testing.assert_close(adaptive_pool(hidden, 4), expected)


@pytest.mark.parametrize("shape", BUILDS)
def test_prompts_are_those_of_the_formula_and_replace_the_old(shape):
    method = fixed(shape)
    batch = tiny.batch_for(method.model)
    block, seen, made = blocks(method.model)[3], [], []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    # The hook before the method's own sees the block's input as the block before left it.
    block._forward_pre_hooks.move_to_end(next(reversed(block._forward_pre_hooks)), last=False)
    block.register_forward_pre_hook(lambda _, args: made.append(args[0].detach()))
    logits(method, batch)
    instruction = batch["attention_mask"].clone()
    if session.task_type(method.model) == TaskType.CAUSAL_LM:
        instruction[:, 4:] = 0  # causal_batch supervises from there on
    weights = block.prompt_generator.down, block.prompt_generator.up
    expected = generate_prompts(seen[0][:, 3:], instruction, *weights, 3)
    torch.testing.assert_close(made[0][:, :3], expected)
    assert torch.equal(made[0][:, 3:], seen[0][:, 3:])


# What prompts must not know


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", DECODERS)
def test_prompts_do_not_know_the_response(shape, training):
    method = fixed(shape)
    batch = tiny.causal_batch()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    is_response = batch["labels"] != tiny.IGNORED
    other["input_ids"][is_response] = 63 - batch["input_ids"][is_response]
    first, second = (prompts_of(method, b, training=training) for b in (batch, other))
    assert len(first) == 2
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two)
    # and they do know the instruction
    other["input_ids"][:, 1] = 63 - batch["input_ids"][:, 1]
    assert not torch.allclose(first[0], prompts_of(method, other)[0])


def test_labels_seen_in_training_do_not_reach_a_generation():
    method = fixed("llama")
    method.model.eval()
    batch = tiny.causal_batch()
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=tiny.PADDING)
    expected = method.model.generate(batch["input_ids"][:1], **options)
    method.watch(batch)
    assert torch.equal(method.model.generate(batch["input_ids"][:1], **options), expected)
    prompt = batch["input_ids"][:1]
    whole = prompts_of(method, {"input_ids": prompt})
    method.watch(batch)
    found = []
    generator = blocks(method.model)[1].prompt_generator
    generator.register_forward_hook(lambda _, args, output: found.append(output))
    method.model.generate(prompt, **options)
    torch.testing.assert_close(found[0], whole[0])


def test_training_without_having_shown_the_labels_is_refused():
    method = fixed("gpt2")
    batch = tiny.causal_batch()
    with pytest.raises(RuntimeError, match="call the method's `watch"):
        method.model(**batch)
    method.watch(tiny.causal_batch(seed=4))
    with pytest.raises(RuntimeError, match="call the method's `watch"):
        method.model(**batch)


def test_texts_in_one_row_are_refused():
    method = fixed("llama")
    batch = tiny.causal_batch(num_examples=1)
    batch["position_ids"] = torch.arange(12)[None] % 6
    del batch["attention_mask"]
    with pytest.raises(ValueError, match="leave that out"):
        method.watch(batch)


# Where they stand


@pytest.mark.parametrize("shape", BUILDS)
def test_a_padded_row_reads_as_it_does_alone(shape):
    method = fixed(shape)
    batch = tiny.batch_for(method.model, num_examples=5)
    is_lm = session.task_type(method.model) == TaskType.CAUSAL_LM
    method.model.eval()
    method.watch(batch)
    together = method.model(**batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        if is_lm:
            alone = {k: v[:, :length] for k, v in alone.items()}
        else:
            alone["input_ids"] = alone["input_ids"][:, :length]
            alone["attention_mask"] = None
        method.watch(alone)
        found = method.model(**alone).logits[0]
        expected = together[row, :length] if is_lm else together[row]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", DECODERS)
def test_a_row_padded_on_the_left_reads_as_it_does_alone(shape):
    method = fixed(shape)
    method.model.eval()
    prompts = torch.tensor([[0, 0, 0, 7, 9], [5, 8, 21, 30, 4]])
    mask = (prompts != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = method.model(prompts, attention_mask=mask, position_ids=positions).logits
    for row, start in enumerate([3, 0]):
        alone = method.model(prompts[row : row + 1, start:]).logits[0]
        torch.testing.assert_close(together[row, start:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", DECODERS)
def test_a_response_is_decoded_with_the_logits_it_is_trained_on(shape):
    method = fixed(shape)
    method.model.eval()
    batch = {k: v[:1] for k, v in tiny.causal_batch().items()}
    expected = logits(method, batch)
    ids = batch["input_ids"]
    outputs = method.model(ids[:, :4], use_cache=True)
    found = [outputs.logits[0]]
    for column in range(4, 12):
        # Some callers give mask and positions, some leave both to the model.
        more = {
            "attention_mask": torch.ones(1, column + 1),
            "position_ids": torch.tensor([[column]]),
        }
        outputs = method.model(
            ids[:, column : column + 1],
            past_key_values=outputs.past_key_values,
            **(more if column % 2 else {}),
        )
        found.append(outputs.logits[0])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", BUILDS)
def test_the_text_keeps_its_length_and_the_whole_context(shape):
    method = fixed(shape)
    length = 62 if shape == "roberta" else 64
    ids = torch.randint(3, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    method.model.eval()
    assert backbone(method.model)(ids).last_hidden_state.shape == (1, length, 32)


def test_spans_are_found_among_the_tokens_of_the_text():
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    method = Spt(bottleneck=4)
    model = method.prepare(
        RobertaForQuestionAnswering(config), task_type=TaskType.QUESTION_ANS, heads=("qa_outputs",)
    ).eval()
    ids = torch.arange(3, 12)[None]
    method.watch({"input_ids": ids, "start_positions": torch.tensor([2])})
    assert model(ids).start_logits.shape == (1, 9)


@pytest.mark.parametrize("searches", [True, False])
@pytest.mark.parametrize("shape", BUILDS)
def test_gradients_are_the_same_with_checkpointing(shape, searches):
    gradients = []
    for checkpointed in (False, True):
        method = fixed(shape, layers=None if searches else [1, 3])
        model, batch = method.model, tiny.batch_for(method.model)
        if checkpointed:
            model.config.use_cache = False
            # The second is the name before Transformers 5.22.
            names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            next(getattr(model, n) for n in names if hasattr(model, n))({"use_reentrant": False})
        gates = [method._search.alpha] if searches else []
        method.watch(batch)
        loss = model(**batch).loss
        gradients.append(torch.autograd.grad(loss, [*gates, *method.adapter_parameters().values()]))
    torch.testing.assert_close(*gradients)


# The search


def test_gates_keep_their_values_and_share_their_gradient():
    alpha = torch.tensor([0.0, 1.0, -2.0], requires_grad=True)
    a = shared_gates(alpha)
    torch.testing.assert_close(a, alpha.sigmoid())
    (found,) = torch.autograd.grad(a @ torch.tensor([1.0, 2.0, 5.0]), alpha)
    s = alpha.detach().sigmoid()
    # d/d alpha_j of sum_i w_i a_i: s_j (1 - s_j) (w_j - the mean of w by s)
    mean = (s @ torch.tensor([1.0, 2.0, 5.0])) / s.sum()
    torch.testing.assert_close(found, s * (1 - s) * (torch.tensor([1.0, 2.0, 5.0]) - mean))


def test_while_searching_prompts_are_mixed_by_their_gates():
    method = prepared(Spt(bottleneck=8, prompt_length=3, tau=0.5), DEEP["llama"]())
    with torch.no_grad():
        method._search.alpha.copy_(torch.tensor([0.3, -1.0, 2.0]))
    slots, pooled = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(0)).unbind()
    for block, alpha in zip([1, 2, 3], [0.3, -1.0, 2.0], strict=True):
        gate = 0.5 * torch.sigmoid(torch.tensor(alpha))
        generator = blocks(method.model)[block].prompt_generator
        expected = (1 - gate) * slots + gate * generator(pooled)
        torch.testing.assert_close(method._writers()[block](slots, pooled), expected)


def searched(num_steps: int = 8, until: int | None = None, **options):
    options = {"bottleneck": 8, "prompt_length": 3, "num_layers": 2, "search_share": 0.5, **options}
    with tiny.seeded(4):
        drive = Drive(prepared(Spt(**options), DEEP["llama"]()), num_steps=num_steps).begin()
        drive.train(until=until)
    return drive


def test_the_layers_with_the_largest_gates_stay():
    drive = searched(until=3)
    method = drive.method
    assert method.structure() == {"layers": None}
    with torch.no_grad():
        method._search.alpha.copy_(torch.tensor([5.0, -5.0, 4.0]))
    before = {name: p.detach().clone() for name, p in method.adapter_parameters().items()}
    drive.train(until=4)
    assert method.structure() == {"layers": [1, 3]}
    now = method.adapter_parameters()
    assert set(before) - set(now) == {
        "model.layers.2.prompt_generator.down", "model.layers.2.prompt_generator.up",
    }  # fmt: skip
    # Drawn anew: nothing is near where training had brought it.
    assert all((now[name] - before[name]).abs().mean() > 0.02 for name in now)
    assert not any(parameter in drive.optimizer.state for parameter in now.values())
    known = [p for group in drive.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in known] == [id(p) for p in now.values()]
    drive.train()
    method.finish()
    assert method.num_stored() == method.count(method.model, 8)


def test_weights_and_gates_do_not_learn_from_each_others_examples():
    drive = searched(until=1)
    search, session_ = drive.method._search, drive.session
    for parameter in drive.method.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    weights = [p.detach().clone() for p in drive.method.adapter_parameters().values()]
    before = search.alpha.detach().clone()
    search.update(drive.method.model, session_)
    assert not torch.equal(search.alpha, before)
    for parameter, weight in zip(drive.method.adapter_parameters().values(), weights, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.grad, torch.ones_like(weight))


def test_a_step_that_accumulates_batches_has_as_many_of_the_other_half():
    found = []
    for factors in ([3.0], [1.0, 5.0]):  # of one mean
        drive = searched(until=1, consistency=0.0)
        search, session_ = drive.method._search, drive.session
        session_.batches_per_step = len(factors)
        session_.second_half = iter(factors)
        session_.loss = lambda factor, search=search: factor * next(iter(search.gates().values()))
        search.update(drive.method.model, session_)
        found.append(search.alpha.detach().clone())
    assert torch.allclose(*found)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_gates_loss_has_the_distance_of_two_sub_networks(weight):
    drive = searched(until=1, consistency=weight)
    search, model = drive.method._search, drive.method.model
    batch = next(drive.session.second_half)
    (expected,) = torch.autograd.grad(drive.loss_of(batch), search.alpha)
    with tiny.seeded(8):
        kept = [(torch.rand(3) >= 0.5).float() for _ in range(2)]
    assert not torch.equal(*kept)
    if weight:
        hidden = []
        for mask in kept:
            search._kept = mask
            drive.method.watch(batch)
            plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
            hidden.append(backbone(model)(**plain).last_hidden_state)
        search._kept = None
        is_text = batch["attention_mask"].bool()
        distance = torch.nn.functional.mse_loss(hidden[0][is_text], hidden[1][is_text])
        expected = expected + weight * torch.autograd.grad(distance, search.alpha)[0]
    taken = []
    search._optimizer.step = lambda: taken.append(search.alpha.grad.clone())
    with tiny.seeded(8):
        search.update(model, drive.session)
    torch.testing.assert_close(taken[0], expected)


def test_a_run_that_ends_while_searching_says_so():
    drive = searched(until=3)
    with pytest.raises(RuntimeError, match="still searching"):
        drive.method.finish()
    assert drive.method.first_eligible_step() == 4


def test_given_layers_are_not_searched_for():
    assert Spt(layers=[2]).search_steps(100) == 0
    assert Spt(search=False).search_steps(100) == 0
    assert Spt().search_steps(100) == 25
    method = prepared(Spt(bottleneck=4, search=False, num_layers=2), DEEP["gpt2"]())
    assert method.structure() == {"layers": [1, 3]}


def test_layers_are_spaced_evenly():
    assert evenly_spaced(range(1, 32), 8) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert evenly_spaced([1], 1) == [1]


# Counts and refusals


def llama_2_7b():
    return LlamaForCausalLM(LlamaConfig())


def roberta_large():
    return RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
        )
    )


def gpt2_large():
    return GPT2LMHeadModel(GPT2Config(n_embd=1280, n_layer=36, n_head=20))


@pytest.mark.parametrize(
    ("build", "generators", "soft_prompt"),
    [
        (llama_2_7b, 16_777_216, 10 * 4096),
        (roberta_large, 4_194_304, 10 * 1024),
        (gpt2_large, 5_242_880, 10 * 1280),
    ],
)
def test_the_papers_setting_has_the_papers_parameters(build, generators, soft_prompt):
    with torch.device("meta"):
        model = build()
    method = Spt(**Spt.paper)
    assert method.count(model, method.bottleneck) == generators + soft_prompt


def test_llamas_count_is_the_tables():
    with torch.device("meta"):
        model = llama_2_7b()
    assert round(Spt(**Spt.paper).count(model, 256) / 1e6, 1) == 16.8


@pytest.mark.parametrize("layers", [[0, 1], [4], []])
def test_layers_that_cannot_be(layers):
    with pytest.raises(ValueError, match="name at least one of the blocks 1 to 3"):
        prepared(Spt(layers=layers), DEEP["llama"]())


def test_more_layers_than_blocks():
    with pytest.raises(
        ValueError, match="`num_layers` is 4, but prompts can be made before 1 to 3"
    ):
        prepared(Spt(num_layers=4), DEEP["llama"]())


def test_a_single_block_has_no_place_for_prompts():
    with pytest.raises(ValueError, match="single block"):
        prepared(Spt(), tiny.llama(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("option", "value"),
    [("prompt_length", 0), ("tau", 0.0), ("search_share", 1.5), ("consistency", -1.0)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"`{option}` is {value}"):
        Spt(**{option: value})


def test_layers_are_named_or_counted():
    with pytest.raises(ValueError, match="`layers` names the layers and `num_layers` counts them"):
        Spt(layers=[1], num_layers=1)
