import backbones
import pytest
import tiny
import torch
from session import Drive, logits, prepared

from loralloc.allocation.blocks import sublayers
from loralloc.methods.adapterdrop import AdapterDrop
from loralloc.methods.houlsby import Houlsby

NUM_BLOCKS = 6


def trained(num_steps=12, **options):
    """On six blocks: training leaves out up to 5, test up to 2."""
    model = tiny.llama(num_hidden_layers=NUM_BLOCKS)
    method = prepared(AdapterDrop(**{"bottleneck": 4, **options}), model)
    drive = Drive(method, num_steps=num_steps).begin()
    drive.train()
    return method


def acting(method):
    """The blocks whose adapters are run in the mode the model is in."""
    seen, hooks = set(), []
    for sublayer in sublayers(method.model):
        hooks.append(
            sublayer.owner.adapter.register_forward_hook(
                lambda *_, block=sublayer.block: seen.add(block)
            )
        )
    method.model(**tiny.batch_for(method.model))
    for hook in hooks:
        hook.remove()
    return sorted(seen)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 20_971_520), ("roberta-large", 3_932_160), ("gpt2-large", 7_372_800)],
)
def test_the_papers_setting_has_the_papers_parameters(name, parameters):
    model = backbones.build(name)
    method = AdapterDrop(**AdapterDrop.paper)
    assert method.count(model, method.bottleneck) == parameters
    assert prepared(method, model).num_stored() == parameters


@pytest.mark.parametrize(
    ("num_blocks", "most", "at_test"), [(12, 10, 5), (32, 27, 5), (24, 20, 5), (6, 5, 2), (2, 1, 0)]
)
def test_blocks_left_out_are_the_papers_share(num_blocks, most, at_test):
    method = prepared(AdapterDrop(bottleneck=2), tiny.llama(num_hidden_layers=num_blocks))
    Drive(method).begin()
    drawn = set()
    for number in range(20 * num_blocks):
        method.step(number + 1)
        drawn.add(method.state()["dropped"])
    assert drawn == set(range(most + 1))
    method.finish()
    method.model.eval()
    assert acting(method) == list(range(at_test, num_blocks))


def test_a_step_leaves_out_the_first_blocks_and_takes_no_gradient_below():
    method = prepared(AdapterDrop(bottleneck=4), tiny.llama(num_hidden_layers=NUM_BLOCKS))
    drive = Drive(method).begin()
    method.load_state({**method.state(), "dropped": 4})
    assert acting(method) == [4, 5]
    drive.loss_of(drive.batch).backward()
    with_gradient = {
        sublayer.block
        for sublayer in sublayers(method.model)
        if any(p.grad is not None for p in sublayer.owner.adapter.parameters())
    }
    assert with_gradient == {4, 5}


def test_nothing_below_the_first_adapter_is_in_the_graph():
    method = prepared(AdapterDrop(bottleneck=4), tiny.llama(num_hidden_layers=NUM_BLOCKS))
    Drive(method).begin()
    method.load_state({**method.state(), "dropped": 4})
    needs = []
    for block in method.model.model.layers:
        block.register_forward_hook(lambda _, args, out: needs.append(out.requires_grad))
    method.model(**tiny.batch_for(method.model))
    assert needs == [False] * 4 + [True] * 2


def test_micro_batches_of_one_step_leave_out_the_same_blocks():
    method = prepared(AdapterDrop(bottleneck=4), tiny.llama(num_hidden_layers=NUM_BLOCKS))
    Drive(method).begin()
    drawn = []
    for number in range(1, 30):
        first = acting(method)
        assert acting(method) == first
        drawn.append(len(first))
        method.step(number)
    assert len(set(drawn)) == NUM_BLOCKS


def test_while_training_goes_on_all_adapters_are_evaluated():
    method = prepared(AdapterDrop(bottleneck=4), tiny.llama(num_hidden_layers=NUM_BLOCKS))
    Drive(method).begin().train(until=4)
    method.model.eval()
    assert acting(method) == list(range(NUM_BLOCKS))


def test_at_the_end_the_first_blocks_go_without_and_all_are_saved(tmp_path):
    method = trained()
    method.finish()
    method.save(tmp_path)
    opened = prepared(AdapterDrop(**method.options()), tiny.llama(num_hidden_layers=NUM_BLOCKS))
    opened.load(tmp_path)
    whole = Houlsby(bottleneck=4)
    prepared(whole, tiny.llama(num_hidden_layers=NUM_BLOCKS))
    for mine, saved in zip(
        whole.adapter_parameters().values(), method.adapter_parameters().values(), strict=True
    ):
        mine.data.copy_(saved.data)
    for sublayer in sublayers(whole.model):
        if sublayer.block < 2:
            sublayer.owner.adapter.up.data.zero_()
    batch = tiny.batch_for(whole.model)
    assert torch.equal(logits(method, batch), logits(whole, batch))
    assert torch.equal(logits(opened, batch), logits(whole, batch))


@pytest.mark.parametrize("dropped", [0, 3, NUM_BLOCKS])
def test_other_blocks_may_go_without_at_test(dropped):
    method = trained(num_steps=2, dropped_at_test=dropped)
    method.model.eval()
    assert acting(method) == list(range(NUM_BLOCKS))
    method.finish()
    assert acting(method) == list(range(dropped, NUM_BLOCKS))


@pytest.mark.parametrize("dropped", [-1, 3])
def test_a_number_of_blocks_that_there_are_not_is_refused(dropped):
    with pytest.raises(ValueError, match=f"`dropped_at_test` is {dropped} and the model has 2"):
        prepared(AdapterDrop(dropped_at_test=dropped), tiny.llama())


def test_another_seed_draws_other_blocks():
    drawn = []
    for seed in (0, 0, 1):
        method = prepared(AdapterDrop(bottleneck=2), tiny.llama(num_hidden_layers=NUM_BLOCKS))
        drive = Drive(method)
        drive.session.seed = seed
        drive.begin()
        numbers = []
        for number in range(10):
            numbers.append(method.state()["dropped"])
            method.step(number + 1)
        drawn.append(numbers)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_global_generator_is_left_alone():
    method = prepared(AdapterDrop(bottleneck=2), tiny.llama())
    before = torch.get_rng_state()
    Drive(method).begin()
    method.step(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_after_training_blocks_can_be_dropped_and_given_back():
    method = trained(dropped_at_test=1)
    method.finish()
    batch = tiny.causal_batch(seed=9)
    without = logits(method, batch)
    method.drop(0)
    whole = logits(method, batch)
    assert not torch.equal(without, whole)
    method.drop(1)
    assert torch.equal(logits(method, batch), without)
