"""A round waits for its device as often for many modules as for few."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from loralloc.allocation.importance import gradient
from loralloc.allocation.layers import lora_layers, weights_b
from loralloc.allocation.objective import Objective
from loralloc.allocation.policy import Limits, plan
from loralloc.allocation.resize import resize
from loralloc.allocation.transfers import followed_by, from_cpu, to_cpu

TENSOR = torch.Tensor
WAITING = {
    *(TENSOR.cpu, TENSOR.item, TENSOR.tolist, TENSOR.numpy, TENSOR.__float__, TENSOR.__int__),
    *(TENSOR.__bool__, TENSOR.__index__, torch.tensor, torch.as_tensor, torch.equal),
    *(torch.nonzero, TENSOR.nonzero),
}


class Waits(TorchFunctionMode):
    """Counts what fetches from a device or sends to it, or would where there is one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        to_a_device = function is TENSOR.to and any(isinstance(x, torch.device) for x in args)
        self.count += function in WAITING or to_a_device
        return function(*args, **(kwargs or {}))


def waits_of_a_round(num_blocks, *, new_state="zero"):
    model = tiny.with_trained_b(tiny.adapted(tiny.llama(num_hidden_layers=num_blocks), r=3))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    model(**tiny.causal_batch()).loss.backward()
    optimizer.step()
    objective = Objective(model, [tiny.causal_batch()])
    limits = Limits(num_pruned=6 * num_blocks)
    gradient.score(objective, weights_b(lora_layers(model)), limits)  # the first looks at the head
    with Waits() as scoring:
        scores = gradient.score(objective, weights_b(lora_layers(model)), limits)
    decided = plan(scores, limits)
    assert len(decided.pruned) >= num_blocks and sum(map(bool, decided.added.values())) > 1
    with Waits() as resizing:
        resize(model, decided, optimizer=optimizer, new_state=new_state)
    return scoring.count, resizing.count


@pytest.mark.parametrize("new_state", ["zero", "survivors"])
def test_waits_do_not_grow_with_the_modules(new_state):
    few = waits_of_a_round(2, new_state=new_state)
    assert waits_of_a_round(6, new_state=new_state) == few
    assert few[0] > 0 and few[1] == 1  # the new rows are sent


@given(st.lists(st.integers(0, 6), unique=True, max_size=7), st.integers(0, 3), st.integers(0, 1))
def test_slices_are_what_an_index_selects(kept, added, dim):
    old = torch.arange(35.0).view(7, 5) if dim == 0 else torch.arange(35.0).view(5, 7)
    shape = list(old.shape)
    shape[dim] = added
    new = torch.full(shape, -1.0)
    index = torch.tensor(kept, dtype=torch.long)
    expected = torch.cat([old.index_select(dim, index), new], dim=dim)
    assert torch.equal(followed_by(kept, old, new, dim=dim), expected)


def test_tensors_come_back_by_their_names_with_their_shapes_and_dtypes():
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(3, dtype=torch.float64),
        "c": torch.zeros(0),
        "d": torch.tensor(5.0),
    }
    back = to_cpu(tensors)
    assert list(back) == list(tensors)
    torch.testing.assert_close(back, tensors, rtol=0, atol=0)
    rows = {name: torch.randn(2, 3) for name in ("x", "y", "z")}
    like = {"x": torch.zeros(1), "y": torch.zeros(1).bfloat16(), "z": torch.zeros(1)}
    sent = from_cpu(rows, like)
    assert all(torch.equal(sent[name], rows[name].to(like[name])) for name in rows)
