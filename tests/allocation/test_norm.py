"""A rank's size as its importance, against the update written out as a matrix."""

import mixtures
import pytest
import tiny
import torch

from loralloc.allocation.allocator import Allocator
from loralloc.allocation.config import AllocationConfig
from loralloc.allocation.importance.norm import Norm
from loralloc.allocation.layers import experts_of, lora_layers, ranks, weights_ab


def adapted_mixture():
    named = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    return tiny.adapted(mixtures.qwen3_moe(), task_type="CAUSAL_LM", **named)


def slow(layer, a, b, rank, experts):
    """The norm of what one rank adds to the weights, of all experts one below the other."""
    scaling = layer.scaling["default"]
    updates = []
    for expert in range(experts):
        row = a.view(experts, -1, a.shape[1])[expert, rank]
        column = b.view(b.shape[0], -1, experts)[:, rank, expert]
        updates.append(scaling * torch.outer(column, row))
    return torch.cat(updates).norm()


def scored(model):
    return Norm(model).score().importance


@pytest.mark.parametrize("build", [lambda: tiny.adapted(tiny.llama()), adapted_mixture])
def test_it_is_the_norm_of_the_ranks_update(build):
    model = tiny.with_trained_b(build())
    layers = lora_layers(model)
    experts = experts_of(layers)
    assert bool(experts) is (build is adapted_mixture)
    found = scored(model)
    for name, (a, b) in weights_ab(layers).items():
        expected = [
            slow(layers[name], a.detach(), b.detach(), rank, experts.get(name, 1))
            for rank in range(ranks(layers)[name])
        ]
        torch.testing.assert_close(found[name], torch.stack(expected))


def test_the_smallest_ranks_go():
    model = tiny.with_trained_b(tiny.adapted(tiny.llama()))
    name, (_, b) = next(iter(weights_ab(lora_layers(model)).items()))
    with torch.no_grad():
        b[:, 1:3] *= 1e-6
    entry = Allocator(model, AllocationConfig(score="norm", ranks_per_round=2)).step(None)
    assert entry.pruned == {name: [1, 2]}


def test_what_another_score_saved_is_refused():
    with pytest.raises(ValueError, match=r"\(rounds\) is not of 'norm'; resume with the score"):
        Norm(tiny.adapted(tiny.llama())).load_state({"rounds": torch.tensor(1)})
