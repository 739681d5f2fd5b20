"""Liger's layers in the frozen blocks, beside the fast step and the loss at supervised positions.

Its kernels need a GPU. Stand-ins that compute the same, and write where its own write (rope into
its inputs; backward of SwiGLU and of the norms into what they were given), take their places.
"""

import sys
import types
from types import SimpleNamespace

import pytest
import tiny
import torch
import trainers
import transformers.integrations.liger
import transformers.trainer
from torch.nn import functional

from loralloc import AllocationConfig, attach, speed_up, use_supervised_loss
from loralloc.kernels import lora
from loralloc.runs.liger import HEADS, fit_liger


class SiluMul(torch.autograd.Function):
    """silu(a) b, whose backward writes into a and b."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return functional.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        sigmoid = a.sigmoid()
        db = grad * a * sigmoid
        a.copy_(grad * b * sigmoid * (1 + a * (1 - sigmoid)))
        b.copy_(db)
        return a, b


class Norm(torch.autograd.Function):
    """x / rms(x) times a frozen weight, whose backward writes into the gradient it is given."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        scale = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad.mul_(weight)
        along = (grad * x).mean(-1, keepdim=True) * scale**2
        return grad.sub_(x * along).mul_(scale), None, None


@pytest.fixture
def liger(monkeypatch):
    """The package with stand-ins, and the names of those that ran."""
    seen = set()

    def swiglu(mlp, x):
        seen.add("swiglu")
        return mlp.down_proj(SiluMul.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    def norm(module, x):
        seen.add("norm")
        return Norm.apply(x, module.weight, module.variance_epsilon)

    def apply_to_llama(rms_norm=True, swiglu_on=True, fused_linear_cross_entropy=True, model=None):
        if fused_linear_cross_entropy:
            seen.add("whole forward")
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(swiglu, layer.mlp)
            for own in (layer.input_layernorm, layer.post_attention_layernorm):
                own.forward = types.MethodType(norm, own)

    def apply_to_instance(model, **options):
        known = ("rms_norm", "fused_linear_cross_entropy")
        apply_to_llama(model=model, **{k: v for k, v in options.items() if k in known})

    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = apply_to_instance
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama, "qwen2": apply_to_llama}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(transformers.integrations.liger, "is_liger_kernel_available", lambda: True)
    return seen


def arguments(device="cuda", **config):
    return SimpleNamespace(device=torch.device(device), liger_kernel_config=config or None)


def test_the_head_stays_ours(liger):
    for given in ({}, {"rms_norm": False}):
        args = arguments(**given)
        fit_liger(args, tiny.llama())
        assert args.liger_kernel_config == {**given, **dict.fromkeys(HEADS, False)}


@pytest.mark.parametrize("option", HEADS)
def test_a_loss_of_ligers_own_is_refused(option, liger):
    with pytest.raises(ValueError, match=f"`liger_kernel_config` has `{option}`, a loss in the"):
        fit_liger(arguments(**{option: True}), tiny.llama())


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match="are for GPUs and this run computes on the CPU; leave"):
        fit_liger(arguments("cpu"), tiny.llama())


def test_an_architecture_without_kernels_is_refused(liger):
    with pytest.raises(ValueError, match="no kernels for models of the type 'bert', only"):
        fit_liger(arguments(), tiny.bert_classifier())


@pytest.mark.filterwarnings(
    "ignore:`use_liger_kernel=True` is deprecated:FutureWarning",
    "ignore:liger-kernel did not return token_accuracy:UserWarning",  # of TRL before 1.16
)
@pytest.mark.parametrize("kind", ["trl", "trainer"])
def test_a_run_with_rounds_has_the_losses_of_stock_peft(
    kind, liger, llama_folder, tmp_path, monkeypatch
):
    ran = set()
    own = lora._lora_linears
    monkeypatch.setattr(lora, "_lora_linears", lambda *args: ran.add("ours") or own(*args))

    def made(**options):
        if kind == "trl":
            return trainers.sft_trainer(tmp_path, model_folder=llama_folder, **options)
        return trainers.causal_trainer(tmp_path, **options)

    def trained(trainer):
        attach(trainer, AllocationConfig(num_rounds=2, scoring_examples=4, seed=0))
        trainer.train()
        return trainers.losses(trainer)

    expected = trained(made())
    assert not liger and not ran
    options = dict(use_liger_kernel=True)
    if kind == "trainer":
        options["liger_kernel_config"] = {"fused_linear_cross_entropy": False}
    fast = made(**options)
    speed_up(fast.model)
    if kind == "trainer":
        use_supervised_loss(fast)
    found = trained(fast)
    assert liger - {"whole forward"} == {"swiglu", "norm"} and ran  # of TRL before 1.16
    assert found == pytest.approx(expected, rel=1e-3)
