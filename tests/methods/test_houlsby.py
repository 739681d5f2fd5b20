import backbones
import pytest
import tiny
import torch
from session import prepared

from loralloc.allocation.blocks import sublayers
from loralloc.methods.houlsby import Houlsby


@pytest.mark.parametrize(
    ("name", "bias", "parameters"),
    [
        ("llama-2-7b", False, 20_971_520),
        ("llama-2-7b", True, 21_236_224),
        ("roberta-large", False, 3_932_160),
        ("roberta-large", True, 3_983_232),
        ("gpt2-large", False, 7_372_800),
        ("gpt2-large", True, 7_467_840),
    ],
)
def test_the_papers_setting_has_the_papers_parameters(name, bias, parameters):
    model = backbones.build(name)
    method = Houlsby(**Houlsby.paper, bias=bias)
    assert method.count(model, method.bottleneck) == parameters
    assert prepared(method, model).num_trained() == parameters


def test_a_budget_of_loras_parameters_gives_the_nearest_bottleneck():
    method = Houlsby()
    method.fit(backbones.build("llama-2-7b"), 19_988_480)
    assert method.bottleneck == 38


def test_the_first_weights_are_a_normal_distribution_cut_off():
    method = prepared(Houlsby(bottleneck=40, init_std=0.05), tiny.llama())
    adapters = [sublayer.owner.adapter for sublayer in sublayers(method.model)]
    down = torch.stack([adapter.down for adapter in adapters]).detach()
    assert down.abs().max() <= 0.1
    assert down.std().item() == pytest.approx(0.05 * 0.8796, rel=0.05)  # of what is within 2 sd
    assert not any(adapter.up.any() for adapter in adapters)
