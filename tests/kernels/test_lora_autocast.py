"""Under autocast the fused step computes in autocast's dtype, as near to the truth as PEFT."""

import copy

import pytest
import tiny
import torch
from lora_steps import Calls, assert_equal_steps, batch_for, fused_copy, loss_and_gradients
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loralloc.kernels.lora import fuse
from loralloc.kernels.packed import MULTIPLE

HALF = torch.bfloat16
BASES = {"float32": torch.float32, "bfloat16": HALF}


def autocast():
    return torch.autocast("cpu", HALF)


def adapted(build=tiny.llama, dtype=torch.float32, seed=2, **options):
    model = tiny.with_trained_b(tiny.adapted(build(), **options), seed=seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def in_one_row(model):
    loss, gradients = loss_and_gradients(model)
    assert {g.dtype for name, g in gradients.items() if "lora_" in name} == {torch.float32}
    return torch.cat([loss.double().view(1), *(g.flatten().double() for g in gradients.values())])


@pytest.mark.parametrize("dtype", BASES.values(), ids=BASES)
@pytest.mark.parametrize("build", tiny.MODELS)
def test_loss_and_gradients_are_as_near_to_the_truth_as_those_of_peft(build, dtype, monkeypatch):
    squared = {"peft": 0.0, "fused": 0.0}  # over several draws: rounding of one is chance
    calls = Calls(monkeypatch)
    for seed in range(6):
        model = adapted(build, dtype, seed)
        truth = in_one_row(copy.deepcopy(model).float())
        with autocast():
            found = {"peft": in_one_row(model), "fused": in_one_row(fused_copy(model))}
        for name, row in found.items():
            squared[name] += float(((row - truth).norm() / truth.norm()) ** 2)
    assert calls
    assert squared["fused"] < 1.1**2 * squared["peft"] < 6 * 0.02**2


def layers(num=1, width=48, **changes):
    """LoRA linears of PEFT side by side, and their fused twins."""
    names = ("q_proj", "k_proj", "v_proj")[:num]
    with tiny.seeded(3):
        options = dict(r=8, lora_alpha=16)
        peft = nn.ModuleDict(
            {
                name: Linear(
                    nn.Linear(width, width).requires_grad_(False),
                    "default",
                    LoraConfig(**options),
                    **options,
                )
                for name in names
            }
        )
        for layer in peft.values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
            layer.base_layer.to(**changes)
    fused = copy.deepcopy(peft)
    assert fuse(fused) == num
    return peft, fused


def outputs_and_gradients(modules, x, *, enabled=True):
    modules.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", HALF, enabled=enabled):
        outputs = [layer(x) for layer in modules.values()]
    sum(output.float().square().sum() for output in outputs).backward()
    gradients = [p.grad.clone() for p in modules.parameters() if p.requires_grad]
    return [*(output.detach() for output in outputs), x.grad, *gradients]


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", BASES.values(), ids=BASES)
@pytest.mark.parametrize("num", [1, 3])
def test_every_output_and_gradient_has_the_dtype_and_no_more_than_the_error_of_peft(
    base, dtype, num
):
    peft, fused = layers(num, dtype=base)
    exact = copy.deepcopy(peft).double()
    squared = 0
    for seed in range(5):
        x = torch.randn(300, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)
        truth = outputs_and_gradients(exact, x.double(), enabled=False)
        ours, theirs = (outputs_and_gradients(modules, x) for modules in (fused, peft))
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        squared += torch.tensor(
            [
                [float((t - t_i).norm() ** 2) for t, t_i in zip(found, truth, strict=True)]
                for found in (ours, theirs)
            ]
        )
    ratios = (squared[0] / squared[1]).sqrt()
    assert ratios[: num + 1].max() < 1  # outputs and the gradient of the input
    assert ratios.max() < 1.03  # the gradients of A and B are rounded as PEFT rounds them


@pytest.mark.parametrize("base_trains", [False, True], ids=["linear", "update"])
def test_backward_is_the_same_within_autocast_and_outside_of_it(base_trains):
    _, fused = layers(3)
    for layer in fused.values():
        layer.base_layer.weight.requires_grad_(base_trains)
    results = []
    for forward, backward in ((False, False), (False, True), (True, False), (True, True)):
        fused.zero_grad()
        x = torch.linspace(-1, 1, 96).view(2, 48).requires_grad_()
        with torch.autocast("cpu", HALF, enabled=forward):
            outputs = [layer(x) for layer in fused.values()]
        total = sum(output.float().square().sum() for output in outputs)
        with torch.autocast("cpu", HALF, enabled=backward):
            total.backward()
        adapter = [p.grad for n, p in fused.named_parameters() if "lora_" in n]
        results.append([x.grad, *adapter] if not base_trains else adapter)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[2], results[3]))
    assert not torch.equal(results[0][-1], results[2][-1])


def test_over_a_base_layer_in_float32_arithmetic_the_sum_is_float32():
    class Exact(nn.Linear):
        """Computes outside of autocast, as quantised layers do."""

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    x, results = torch.linspace(-1, 1, 96).view(2, 48), []
    for modules in layers():
        modules.q_proj.base_layer.__class__ = Exact
        results.append(outputs_and_gradients(modules, x))
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.02)


class Casts(TorchDispatchMode):
    """How often a tensor of some shape was given another dtype."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_frozen_weight_is_cast_once_in_a_step_and_kept_as_autocast_keeps_it():
    x = torch.randn(4, 48)
    found = []
    for modules in layers():
        weight = modules.q_proj.base_layer.weight
        kept = {}
        with (
            Casts(weight.shape) as casts,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
            ),
        ):
            outputs_and_gradients(modules, x)
        whole = [t for t in kept.values() if t.numel() == weight.numel()]
        found.append((casts.count, [t.dtype for t in whole]))
    assert found == [(1, [HALF])] * 2


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_input_is_kept_once_and_in_half_precision(needs_gradient):
    x, rank, width = torch.randn(40, 48, requires_grad=needs_gradient), MULTIPLE, 48
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    _, fused = layers(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast():
        outputs = [layer(x) for layer in fused.values()]
    assert outputs[0].grad_fn is outputs[2].grad_fn
    numbers = 40 * width + 3 * rank * 40  # x and A x; A and B are made once for all passes
    weights = 3 * width * width if needs_gradient else 0
    assert sum(kept.values()) == 2 * (numbers + weights)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = fused_copy(adapted()).train()
    with autocast():
        expected = loss_and_gradients(model)
    base = model.get_base_model()
    base.config.use_cache = False
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    with autocast():
        got = loss_and_gradients(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_half_precision_of_another_kind():
    model, batch = adapted(), batch_for(tiny.llama())
    fused = fused_copy(model)
    with torch.autocast("cpu", torch.float16):
        assert_equal_steps(model, fused, tolerance=0.02, batch=batch)
        assert fused(**batch).logits.dtype == torch.float16
