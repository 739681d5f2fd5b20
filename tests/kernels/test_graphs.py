"""Blocks that are replayed give the losses and the gradients that they give when they are run."""

import copy

import pytest
import tiny
import torch
from accelerate.state import GradientState
from taped import Tape
from torch import nn

from loralloc.allocation.blocks import blocks
from loralloc.allocation.layers import base_model
from loralloc.allocation.resize import resize
from loralloc.kernels.covered import RankGate
from loralloc.kernels.graphs import GraphedBlocks
from loralloc.kernels.lora import fuse


def pair(build=tiny.llama, **options):
    """A fused model, and a copy of it whose blocks are recorded."""
    model = tiny.with_trained_b(tiny.adapted(build(), **options))
    fuse(model)
    twin = copy.deepcopy(model)
    return model, twin, graphed(twin)


def graphed(model):
    return GraphedBlocks(blocks(base_model(model)), lambda: Tape)


def batch_of(seed, length=8, padded=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - padded :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def step(model, optimizer, batches, graphs=None):
    """Losses, and the gradients that one step of all batches has."""
    losses = []
    for batch in batches:
        if graphs:
            with graphs.on():
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses), gradients


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def assert_same_run(model, twin, graphs, steps):
    of_one, of_other = optimizer_of(model), optimizer_of(twin)
    for batches in steps:
        expected = step(model, of_one, batches)
        torch.testing.assert_close(step(twin, of_other, batches, graphs), expected)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_steps_are_those_of_a_model_that_is_run(build):
    model, twin, graphs = pair(build)
    assert_same_run(model, twin, graphs, [[batch_of(seed)] for seed in range(4)])
    assert len(graphs._recorded) == 1


def test_gradients_accumulate():
    model, twin, graphs = pair()
    assert_same_run(model, twin, graphs, [[batch_of(2 * s), batch_of(2 * s + 1)] for s in range(3)])
    assert len(graphs._recorded) == 1


def test_weights_are_made_ready_in_every_replay_also_of_a_recording_between_two_steps():
    """While gradients accumulate, what was made ready for one pass is read by the next."""
    model, twin, graphs = pair()
    state = GradientState()
    state._set_sync_gradients(False)
    try:
        assert_same_run(model, twin, graphs, [[batch_of(0), batch_of(1)]])
    finally:
        state._set_sync_gradients(True)
    assert_same_run(model, twin, graphs, [[batch_of(seed)] for seed in range(2, 5)])
    assert len(graphs._recorded) == 1


def test_every_shape_is_a_recording_and_a_mask_is_read_anew():
    model, twin, graphs = pair()
    batches = [batch_of(s, length, padded=1 + s % 2) for s, length in enumerate([6, 8, 6, 8, 6, 8])]
    assert_same_run(model, twin, graphs, [[batch] for batch in batches])
    assert len(graphs._recorded) == 2


def test_blocks_whose_ranks_are_gated_are_run():
    """Gates are other tensors in every step, whose gradients no recording gives."""
    model, twin, graphs = pair()
    for number in range(3):
        gates = []
        for each in (model, twin):
            gates.append(torch.full((4,), 1.0 + number, requires_grad=True))
            a = next(m for n, m in each.named_modules() if n.endswith("q_proj.lora_A.default"))
            hook = a.register_forward_hook(RankGate(lambda gate=gates[-1]: gate))
            with graphs.on():
                each(**batch_of(number)).loss.backward()
            hook.remove()
        torch.testing.assert_close(gates[1].grad, gates[0].grad)
        assert gates[0].grad.abs().sum() > 0
    assert not graphs._recorded


def test_after_a_round_there_are_new_recordings():
    model, twin, graphs = pair()
    assert_same_run(model, twin, graphs, [[batch_of(s)] for s in range(3)])
    for each in (model, twin):
        torch.manual_seed(0)
        resize(each, {"model.layers.0.self_attn.q_proj": 7, "model.layers.1.mlp.up_proj": 0})
    assert_same_run(model, twin, graphs, [[batch_of(s)] for s in range(3, 7)])
    assert len(graphs._recorded) == 1


def test_an_adapter_that_is_off_is_not_replayed():
    model, twin, graphs = pair()
    assert_same_run(model, twin, graphs, [[batch_of(s)] for s in range(3)])
    with model.disable_adapter(), twin.disable_adapter(), graphs.on():
        x = batch_of(3)
        torch.testing.assert_close(twin(**x).loss, model(**x).loss)
    assert_same_run(model, twin, graphs, [[batch_of(s)] for s in range(4, 7)])


def test_a_second_pass_before_the_first_went_back_runs_as_ever():
    model, twin, graphs = pair()
    assert_same_run(model, twin, graphs, [[batch_of(s)] for s in range(3)])
    for each in (model, twin):
        with graphs.on():
            first, second = each(**batch_of(5)).loss, each(**batch_of(6)).loss
        (first + 2 * second).backward()
    for expected, got in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_a_pass_that_nothing_goes_back_through_holds_up_nobody():
    _, twin, graphs = pair()
    for _ in range(4):
        with graphs.on():
            twin(**batch_of(0))  # its graph is dropped
    (recorded,) = graphs._recorded.values()
    assert not recorded.is_busy


def test_outside_of_it_and_without_gradients_nothing_is_recorded():
    model, twin, graphs = pair()
    for _ in range(3):
        torch.testing.assert_close(twin(**batch_of(0)).logits, model(**batch_of(0)).logits)
        with graphs.on(), torch.no_grad():
            torch.testing.assert_close(twin(**batch_of(0)).logits, model(**batch_of(0)).logits)
    assert not graphs._recorded


def test_a_pass_with_a_cache_runs_as_ever():
    model, twin, graphs = pair()
    for _ in range(3):
        batch = {**batch_of(0), "use_cache": True}
        with graphs.on():
            torch.testing.assert_close(twin(**batch).loss, model(**batch).loss)
    assert not graphs._recorded


def test_autocast_is_another_recording():
    model, twin, graphs = pair()
    for seed in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 == 1):
            expected = model(**batch_of(seed)).loss
            with graphs.on():
                got = twin(**batch_of(seed)).loss
        got.backward()
        expected.backward()
        torch.testing.assert_close(got, expected)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    assert len(graphs._recorded) == 2


def test_blocks_that_read_different_masks_are_refused():
    class Block(nn.Module):
        def forward(self, x, mask):
            return x * mask

    stack = [Block(), Block()]
    graphs = GraphedBlocks(stack, lambda: Tape)
    x = torch.ones(2, 2, requires_grad=True)
    with graphs.on(), pytest.raises(ValueError, match="same mask"):
        stack[1](stack[0](x, mask=torch.ones(2)), mask=torch.zeros(2))


def test_blocks_get_their_own_forward_back():
    model, twin, graphs = pair()
    graphs.remove()
    assert not any("forward" in vars(block) for block in blocks(base_model(twin)))
    torch.testing.assert_close(twin(**batch_of(0)).logits, model(**batch_of(0)).logits)
