"""What is made once for a pass is never read where the weights are others."""

import copy
import io
import itertools
import pickle

import pytest
import tiny
import torch
from accelerate.state import GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Launches
from lora_steps import assert_equal_steps, fused_copy, loss_and_gradients
from peft.tuners.lora import LoraLayer
from torch import nn

from loralloc.allocation.resize import resize
from loralloc.kernels import packed
from loralloc.kernels.lora import fuse
from loralloc.kernels.packed import Packs


def adapted(**options):
    return tiny.with_trained_b(tiny.adapted(tiny.llama(), **options))


def warm(model):
    """A fused copy that has read its weights already, in passes of both kinds."""
    fused = fused_copy(model)
    for _ in range(2):
        loss_and_gradients(fused)
        with torch.no_grad():
            fused(**tiny.causal_batch())
    return fused


@pytest.fixture
def made(monkeypatch):
    """Every time that weights were made ready: of how many layers."""
    seen, pack = [], packed._pack

    def counted(wanted):
        seen.append(sum(len(group) for group, _ in wanted))
        return pack(wanted)

    monkeypatch.setattr(packed, "_pack", counted)
    return seen


@pytest.fixture
def accumulates():
    """What Accelerate says while gradients accumulate."""
    state = GradientState()
    yield lambda does: state._set_sync_gradients(not does)
    state._set_sync_gradients(True)


def factors(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def scaled_in_place(model):
    with torch.no_grad():
        for p in factors(model).values():
            p.mul_(1.5)


def behind_the_version(model):
    for p in factors(model).values():
        p.data.mul_(1.5)


def by_assignment(model):
    for p in factors(model).values():
        p.data -= 0.1 * p.data


def swapped(model):
    for p in factors(model).values():
        p.data = p.data * 1.5


def replaced(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach() * 1.5)


def loaded(model):
    model.load_state_dict({n: p * 1.5 for n, p in factors(model).items()}, strict=False)


def loaded_by_assignment(model):
    state = {n: p.detach() * 1.5 for n, p in factors(model).items()}
    model.load_state_dict(state, strict=False, assign=True)


def rounded_and_back(model):
    model.half().float()


def rescaled(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 1.5


def resized(model):
    to = {"model.layers.0.self_attn.k_proj": 5, "model.layers.1.mlp.up_proj": 0}
    resize(model, to, generator=torch.Generator().manual_seed(0))


def an_optimiser(**options):
    def step(model):
        weights = list(factors(model).values())
        for p in weights:
            p.grad = p.detach().clone()
        torch.optim.AdamW(weights, lr=0.1, **options).step()

    return step


CHANGES = {
    **{f.__name__: f for f in (scaled_in_place, behind_the_version, by_assignment, swapped)},
    **{f.__name__: f for f in (replaced, loaded, loaded_by_assignment, rounded_and_back)},
    **{f.__name__: f for f in (rescaled, resized)},
    "single": an_optimiser(foreach=False),
    "foreach": an_optimiser(foreach=True),
    "fused": an_optimiser(fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_changed_are_read_anew(change):
    model = adapted()
    fused = warm(model)
    for each in (model, fused):
        change(each)
    assert_equal_steps(model, fused)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([*CHANGES, "train", "score", "part"]), max_size=5))
def test_no_order_of_passes_and_changes_reads_what_is_gone(steps):
    model = adapted(r=2)
    fused = warm(model)
    for step in steps:
        if step == "train":
            loss_and_gradients(fused)
        elif step == "score":
            with torch.inference_mode():
                fused(**tiny.causal_batch())
        elif step == "part":  # of the model, as scores begin in the midst of it
            block = fused.get_base_model().model.layers[1]
            x = torch.ones(1, 3, 32)
            block(x, position_embeddings=(x[..., :8], x[..., :8]))
        elif step != "resized" or len(factors(model)) == 28:
            for each in (model, fused):
                CHANGES[step](each)
    assert_equal_steps(model, fused, tolerance=1e-4)


def test_parts_that_take_turns_under_an_optimiser_without_versions_are_not_stale():
    """Both parts were made ready together, and the step of the first lies between."""
    model = adapted()
    fused = warm(model)
    outputs = []
    for each in (model, fused):
        each.zero_grad()
        first, second = (layer.mlp for layer in each.get_base_model().model.layers)
        optimizer = torch.optim.SGD(factors(each).values(), lr=0.5, fused=True)
        x, found = torch.linspace(-1, 1, 96).view(3, 32), []
        for part in itertools.chain(*[(first, second)] * 3):
            found.append(part(x))
            found[-1].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append([output.detach() for output in found])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_the_weights_of_a_pass_are_made_ready_at_once(made):
    fused = fused_copy(adapted())
    loss_and_gradients(fused)
    made.clear()
    loss_and_gradients(fused)
    assert made == [14]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing_nothing_is_made_again(use_reentrant, made):
    fused = fused_copy(adapted())
    base = fused.get_base_model()
    base.config.use_cache = False
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    fused.train()
    loss_and_gradients(fused)
    made.clear()
    loss_and_gradients(fused)
    assert made == [14]


def test_while_gradients_accumulate_nothing_is_made_again(made, accumulates):
    model = adapted()
    fused, batch = fused_copy(model), tiny.causal_batch()
    optimizers = [
        torch.optim.AdamW(factors(each).values(), lr=0.05, fused=True) for each in (model, fused)
    ]
    losses = []
    for step in range(3):
        made.clear()
        for number in range(3):
            accumulates(number < 2)
            found = [each(**batch).loss for each in (model, fused)]
            for loss in found:
                loss.backward()
            losses.append([loss.detach() for loss in found])
        assert made == ([3, 1, 2, 1] * 2 + [14] if step == 0 else [14])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected, got = zip(*losses, strict=True)
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert float(expected[-1]) < float(expected[0])


def test_while_gradients_accumulate_a_change_is_noticed(accumulates):
    for change in (scaled_in_place, swapped, replaced, rescaled, CHANGES["fused"]):
        model = adapted()
        accumulates(True)
        fused = warm(model)
        for each in (model, fused):
            change(each)
        assert_equal_steps(model, fused)


def test_backward_takes_the_weights_of_its_forward():
    model = adapted()
    fused, gradients = warm(model), []
    for each in (model, fused):
        each.zero_grad()
        loss = each(**tiny.causal_batch()).loss
        if each is fused:
            behind_the_version(each)
            each(**tiny.causal_batch())  # a pass with the new weights, in between
        loss.backward()
        gradients.append({n: p.grad for n, p in factors(each).items()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_pass_without_gradients_in_inference_mode_leaves_nothing_that_training_cannot_keep():
    model = adapted()
    fused = fused_copy(model)
    for _ in range(2):
        with torch.inference_mode():
            fused(**tiny.causal_batch())
    assert_equal_steps(model, fused)


def test_weights_made_in_inference_mode_have_no_versions_and_are_read_every_time():
    with torch.inference_mode():
        model = adapted()
        expected = model(**tiny.causal_batch()).logits
        fuse(model)
        for _ in range(2):
            torch.testing.assert_close(model(**tiny.causal_batch()).logits, expected)


def test_nothing_of_it_is_saved_or_copied():
    fused = warm(adapted())
    packs = next(vars(m)["packs"] for m in fused.modules() if "packs" in vars(m))
    assert packs._packs and packs._order
    assert fused.state_dict().keys() == adapted().state_dict().keys()
    twin = copy.deepcopy(fused)
    own = {id(vars(m)["packs"]): vars(m)["packs"] for m in twin.modules() if "packs" in vars(m)}
    assert len(own) == 1 and packs not in own.values()
    assert not any(of._packs or of._order for of in own.values())
    part = copy.deepcopy(fused.get_base_model().model.layers[0].mlp.down_proj)
    assert sum(1 for _ in part.modules()) < 12 and not part.packs._order
    assert len(pickle.dumps(packs)) < 100
    torch.save(packs, stream := io.BytesIO())
    assert len(stream.getvalue()) < 2000


def test_when_a_model_is_gone_no_optimiser_calls_for_it():
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks)
    packs = Packs()
    assert len(optimizer._global_optimizer_post_hooks) == before + 1
    del packs
    assert len(optimizer._global_optimizer_post_hooks) == before


def test_gates_and_weights_that_are_made_for_a_call_are_not_kept():
    model = adapted()
    fused, batch = warm(model), tiny.causal_batch()
    own = dict(factors(fused))
    for times in (1.5, 0.5):
        with torch.no_grad():
            expected = torch.func.functional_call(
                model, {n: times * p for n, p in factors(model).items()}, kwargs=batch
            ).loss
            got = torch.func.functional_call(
                fused, {n: times * p for n, p in own.items()}, kwargs=batch
            ).loss
        torch.testing.assert_close(got, expected)
    assert_equal_steps(model, fused)


def test_experts_that_take_turns_are_made_ready_one_by_one(made):
    """What the pass before has not read, this one does not make everything anew for."""
    fused = fused_copy(adapted(target_modules=["down_proj", "o_proj"]))
    layers = [m for m in fused.modules() if "packs" in vars(m)]
    for numbers in ([0, 1, 3], [0, 2, 3], [1, 2], [0, 1, 2, 3]):
        made.clear()
        for number in numbers:
            layer = layers[number]
            layer(torch.ones(1, layer.in_features))
    assert made == [2, 1, 1]  # 1 and 2 were read, 0 comes before them and 3 behind


def test_making_ready_costs_a_few_operations_however_many_layers_there_are():
    counts = []
    for num_blocks in (2, 4):
        model = tiny.with_trained_b(tiny.adapted(tiny.llama(num_hidden_layers=num_blocks)))
        fused = fused_copy(model)
        layers = [m for m in fused.modules() if "packs" in vars(m)]
        adapters = [((packed.Adapter.of(layer),), torch.bfloat16) for layer in layers]
        with Launches() as launches:
            packed._pack(adapters)
        counts.append(launches.count)
    assert counts[0] == counts[1] <= 10  # four lengths of rows: joined, cast, and all scaled
