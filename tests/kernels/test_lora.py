"""The fused LoRA step equals PEFT's own forward and gradients."""

import copy

import pytest
import tiny
import torch
from lora_steps import assert_equal_steps, fused_copy, loss_and_gradients
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from loralloc.kernels.lora import fuse, is_fused, unfuse
from loralloc.kernels.packed import MULTIPLE


def qwen2():
    """Biases in q, k and v only."""
    options = dict(vocab_size=tiny.VOCABULARY, pad_token_id=tiny.PADDING)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = tiny._build(Qwen2ForCausalLM, Qwen2Config(**options, **sizes, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def adapted(build, **options):
    if build is qwen2:
        options = dict(target_modules=tiny.LLAMA_TARGETS, task_type="CAUSAL_LM", **options)
    return tiny.with_trained_b(tiny.adapted(build(), **options))


def with_base_in_bfloat16(model):
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


MODELS = (*tiny.MODELS, qwen2, tiny.t5)


@pytest.mark.parametrize("build", MODELS)
def test_loss_and_gradients_equal_those_of_peft(build):
    model = adapted(build)
    assert_equal_steps(model, fused_copy(model))


MIXED = dict(rank_pattern={"q_proj": 1, "v_proj": 7, "up_proj": 3})


@pytest.mark.parametrize(
    ("build", "options"), [*((build, {}) for build in (*tiny.MODELS, qwen2)), (tiny.llama, MIXED)]
)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_peft(build, options):
    model = with_base_in_bfloat16(adapted(build, **options))
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    truth, peft, fused = (
        torch.cat([g.flatten().float() for g in loss_and_gradients(m)[1].values()])
        for m in (copy.deepcopy(model).float(), model, fused_copy(model))
    )
    assert (fused - truth).norm() < 1.5 * (peft - truth).norm() < 0.2 * truth.norm()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_may_differ_between_siblings(use_rslora):
    scalings = dict(alpha_pattern={"k_proj": 40, "gate_proj": 1}, use_rslora=use_rslora)
    model = adapted(tiny.llama, **MIXED, **scalings)
    assert len({layer.scaling["default"] for layer in model.modules() if type(layer) is Linear}) > 3
    assert_equal_steps(model, fused_copy(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("build", [tiny.llama, tiny.t5, tiny.bert_classifier])
def test_gradient_checkpointing_gives_the_same_gradients(build, use_reentrant):
    model = adapted(build)
    fused = fused_copy(model)
    base = fused.get_base_model()
    base.config.use_cache = False
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    assert_equal_steps(model.train(), fused.train())


def test_a_deep_copy_of_a_fused_model_trains_as_peft_does():
    model = adapted(tiny.llama)
    fused = fused_copy(model)
    twin, batch = copy.deepcopy(fused), tiny.causal_batch()
    before = {name: parameter.clone() for name, parameter in fused.named_parameters()}
    tiny.train(model, batch, num_steps=3)
    tiny.train(twin, batch, num_steps=3)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-4)
        assert torch.equal(fused.get_parameter(name), before[name])  # the copy is one


def test_unfusing_gives_the_classes_of_peft_back():
    model = adapted(tiny.llama)
    fused = fused_copy(model)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert not any("shared_input" in vars(module) for module in fused.modules())
    assert_equal_steps(model, fused, tolerance=0)
    assert fuse(fused) > 0


def test_only_plain_layers_are_changed_and_they_stay_layers_of_peft():
    model = tiny.adapted(tiny.llama())
    count = sum(type(module) is Linear for module in model.modules())
    assert fuse(model) == count and fuse(model) == 0
    assert all(isinstance(m, Linear) for m in model.modules() if is_fused(m))


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_trainable_base_weights_keep_their_gradient(trains):
    model = adapted(tiny.bert_classifier)
    for name, parameter in model.named_parameters():
        if name.endswith(f"query.base_layer.{trains}"):
            parameter.requires_grad_(True)
    assert_equal_steps(model, fused_copy(model))


def layers(bias=True):
    """One LoRA linear layer of PEFT, 6 to 5 features, and its fused twin."""
    with tiny.seeded(3):
        base = nn.Linear(6, 5, bias=bias).requires_grad_(False)
        peft = Linear(base, "default", LoraConfig(r=2, lora_alpha=3), r=2, lora_alpha=3)
        nn.init.normal_(peft.lora_B["default"].weight)
    fused = copy.deepcopy(peft)
    assert fuse(nn.ModuleDict({"layer": fused})) == 1
    return peft, fused


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 2, 3, 6), (0, 6), (0, 3, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_of_any_shape(shape, bias):
    outputs, gradients = [], []
    for layer in layers(bias):
        x = torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).requires_grad_()
        output = layer((x * x)[: torch.Size(shape).numel()].view(shape))
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_an_input_that_is_not_contiguous():
    peft, fused = layers()
    x = torch.linspace(-1, 1, 24).view(6, 4).t()
    torch.testing.assert_close(fused(x), peft(x))
    x = torch.linspace(-1, 1, 6).expand(3, 6)
    torch.testing.assert_close(fused(x), peft(x))


def test_an_input_without_gradient_leaves_those_of_the_adapter():
    peft, fused = layers()
    x = torch.linspace(-1, 1, 12).view(2, 6)
    for layer in (peft, fused):
        layer(x).square().sum().backward()
    for expected, got in zip(peft.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert x.grad is None


@pytest.mark.parametrize("base_trains", [False, True])
def test_the_output_may_be_changed_in_place(base_trains):
    gradients = []
    for layer in layers():
        layer.base_layer.weight.requires_grad_(base_trains)
        output = layer(torch.ones(2, 3, 6))
        output.mul_(2).clamp_(max=10)
        output.sum().backward()
        gradients.append([layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    torch.testing.assert_close(*gradients)


def test_without_gradients_nothing_is_kept():
    _, fused = layers()
    with torch.no_grad():
        assert fused(torch.ones(2, 6, requires_grad=True)).grad_fn is None


def test_a_second_derivative_is_refused():
    _, fused = layers()
    x = torch.ones(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("base_trains", [False, True], ids=["linear", "update"])
def test_backward_keeps_the_input_and_what_has_a_row_a_rank_only(base_trains):
    num_tokens, width, rank = 40, 6, MULTIPLE
    x = torch.randn(num_tokens, width, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    for layer in layers():
        layer.base_layer.to(torch.bfloat16).weight.requires_grad_(base_trains)
        kept.append(bytes_kept_for_backward(layer, x))
    peft, fused = kept
    assert fused == 2 * rank * num_tokens  # A x, two bytes a number
    assert peft >= 4 * num_tokens * width  # PEFT: the input once more, in float32


def ranks_of_their_own():
    return {
        f"layers.{block}.self_attn.{name}": rank
        for block, pair in enumerate(((1, 7), (3, 8)))
        for name, rank in zip(("q_proj", "v_proj"), pair, strict=True)
    }


def test_products_of_many_ranks_have_the_shapes_and_strides_of_a_few():
    uniform, mixed = (
        products(with_base_in_bfloat16(adapted(tiny.llama, r=5, rank_pattern=pattern)))
        for pattern in ({}, ranks_of_their_own())
    )
    assert len(uniform) > 10
    assert mixed == uniform


def test_in_float32_products_have_the_ranks_that_there_are():
    seen = products(adapted(tiny.llama, r=5, rank_pattern=ranks_of_their_own()))
    stacked = {shape[0] for (shape, _), *_ in seen if shape[1:] == (32,)}
    assert {1 + 5 + 7, 3 + 5 + 8} <= stacked


def test_a_wide_sibling_changes_no_stride_of_the_others():
    strides = []
    for pattern in ({}, {"q_proj": MULTIPLE + 1}):
        model = with_base_in_bfloat16(adapted(tiny.llama, r=MULTIPLE, rank_pattern=pattern))
        added = [tensors[1] for tensors in products(model) if len(tensors) == 3]  # by addmm_
        strides.append({(shape, stride) for shape, stride in added if shape[1] == MULTIPLE})
    assert strides[0] == strides[1] != set()


def products(model):
    """Shapes and strides of all that is multiplied in a training step of a fused copy."""
    model, seen = fused_copy(model), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                seen.add(tuple((t.shape, t.stride()) for t in args if isinstance(t, torch.Tensor)))
            return op(*args, **(kwargs or {}))

    with Watch():
        model(**tiny.batch_for(model)).loss.backward()
    return seen


def bytes_kept_for_backward(layer, x):
    """Without the input, the weights and the output, each storage counted once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())
