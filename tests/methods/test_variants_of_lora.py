"""What PEFT has beside plain LoRA, and LoRA on one kind of sublayer: sizes, groups and options."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from session import BUILDS, Drive, logits, prepared
from test_parameter_counts import gpt2_large, llama_2_7b, roberta_large

from loralloc import open_adapter
from loralloc.allocation.blocks import sublayer_linears
from loralloc.allocation.layers import lora_layers
from loralloc.methods.dora import Dora
from loralloc.methods.lora import Lora
from loralloc.methods.lora_plus import LoraPlus
from loralloc.methods.peft_method import default_budget, resolve_targets, targeted_shapes
from loralloc.methods.pissa import Pissa
from loralloc.methods.rslora import RsLora
from loralloc.methods.sublayer_lora import AttentionOnly, MlpOnly


def adapted(method, build=tiny.llama):
    return list(lora_layers(prepared(method, build()).model))


# One kind of sublayer.


@pytest.mark.parametrize("build", [*BUILDS.values(), tiny.bert_classifier])
def test_the_two_kinds_share_the_linear_layers_of_the_blocks_between_them(build):
    model = build()
    everything = list(targeted_shapes(model, resolve_targets(model, None)))
    attention, mlp = (adapted(kind(rank=2), build) for kind in (AttentionOnly, MlpOnly))
    assert sorted(attention + mlp) == sorted(everything)
    assert not set(attention) & set(mlp)
    assert all("attn" in name or "attention" in name for name in attention)
    assert not any("attn" in name or "attention" in name for name in mlp)
    assert sublayer_linears(model, "attention") == attention


@pytest.mark.parametrize("build", [llama_2_7b, roberta_large, gpt2_large])
@pytest.mark.parametrize("kind", [AttentionOnly, MlpOnly])
def test_at_the_budget_it_has_the_parameters_of_lora_everywhere(kind, build):
    with torch.device("meta"):
        model = build()
    method, budget = kind(), default_budget(model)
    method.fit(model, budget)
    assert method.rank > 8
    assert method.count(model, method.rank) == pytest.approx(budget, rel=0.06)


def test_modules_by_name_are_refused():
    with pytest.raises(ValueError, match="but mlp-only names the modules itself"):
        MlpOnly(targets=["q_proj"])


def test_experts_that_are_parameters_leave_nothing_to_train():
    with pytest.raises(ValueError, match=r"feed-forward sublayers of Qwen3Moe.* nothing for"):
        prepared(MlpOnly(rank=2), tiny.mixture())
    assert len(adapted(AttentionOnly(rank=2), tiny.mixture)) == 8


# PEFT's own.


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Dora(rank=3), {"use_dora": True}),
        (RsLora(rank=3), {"use_rslora": True}),
        (Pissa(rank=3), {"init_lora_weights": "pissa"}),
        (LoraPlus(rank=3), {}),
    ],
    ids=lambda value: getattr(getattr(value, "about", None), "name", None),
)
def test_it_is_the_adapter_that_peft_makes_of_these_options(method, options):
    method = prepared(copy.copy(method), tiny.gpt2())
    config = LoraConfig(
        r=3,
        lora_alpha=3 * method.scale,
        target_modules=tiny.GPT2_TARGETS,
        fan_in_fan_out=True,
        **options,
    )
    with tiny.seeded(3):
        expected = get_peft_model(tiny.gpt2(), config)
    found = dict(method.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter)
        assert found[name].requires_grad == parameter.requires_grad
    batch = tiny.causal_batch()
    torch.testing.assert_close(method.model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("shape", BUILDS)
def test_magnitudes_count(shape):
    method = prepared(Dora(rank=3), BUILDS[shape]())
    plain = prepared(Lora(rank=3), BUILDS[shape]())
    outputs = sum(layer.out_features for layer in lora_layers(plain.model).values())
    assert method.num_trained() == method.count(BUILDS[shape](), 3)
    assert method.num_trained() == plain.num_trained() + outputs


def test_the_scaling_of_rslora_is_alpha_over_the_root_of_the_rank():
    for rank in (2, 8):
        layers = lora_layers(prepared(RsLora(rank=rank), tiny.llama()).model)
        scalings = [layer.scaling["default"] for layer in layers.values()]
        assert scalings == pytest.approx([2 * rank**0.5] * 14)


def test_the_scaling_of_rslora_falls_where_a_budget_chooses_the_rank():
    model = tiny.llama()
    for rank in (2, 8, 32):
        method = RsLora()
        method.fit(model, method.count(model, rank))
        assert method.rank == rank
        assert method.scale * method.rank / rank**0.5 == pytest.approx(16 / rank**0.5)


@pytest.mark.parametrize("shape", BUILDS)
def test_pissa_takes_the_weights_apart_and_stock_peft_does_so_again(shape, tmp_path):
    method = prepared(Pissa(rank=3), BUILDS[shape]())
    inner = method.model.get_base_model()
    name = next(name for name, module in inner.named_modules() if hasattr(module, "lora_A"))
    layer, weight = inner.get_submodule(name), BUILDS[shape]().get_submodule(name).weight
    left = torch.linalg.svdvals(layer.get_base_layer().weight)
    whole = torch.linalg.svdvals(weight)
    torch.testing.assert_close(left[: len(whole) - 3], whole[3:], atol=1e-4, rtol=1e-4)
    Drive(method, num_steps=4).begin().train()
    method.save(tmp_path)
    batch = tiny.batch_for(BUILDS[shape](), seed=9)
    expected = logits(method, batch)
    for opened in (
        PeftModel.from_pretrained(BUILDS[shape](), tmp_path).eval(),
        open_adapter(BUILDS[shape](), tmp_path),
    ):
        with torch.no_grad():
            found = opened(**batch).logits
        found = found[batch["attention_mask"].bool()] if found.ndim == 3 else found
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [Dora, Pissa])
def test_a_run_of_plain_lora_is_not_gone_on_with(kind, tmp_path):
    prepared(Lora(rank=3), tiny.llama()).save(tmp_path)
    with pytest.raises(ValueError, match=r"began with `.*` of .*; resume with the value it began"):
        prepared(kind(rank=3), tiny.llama()).check_saved(tmp_path)


def test_lora_with_dora_as_an_option_is_resumed(tmp_path):
    method = prepared(Lora(rank=3, use_dora=True), tiny.llama())
    Drive(method, num_steps=4).begin().train()
    method.save(tmp_path)
    other = prepared(Lora(rank=3, use_dora=True), tiny.llama())
    other.load(tmp_path)
    batch = tiny.causal_batch(seed=9)
    torch.testing.assert_close(logits(other, batch), logits(method, batch))


# LoRA+.


@pytest.mark.parametrize("shape", BUILDS)
def test_learning_rates_are_those_of_pefts_loraplus_optimizer(shape):
    method = prepared(LoraPlus(rank=3, ratio=4.0), BUILDS[shape]())
    optimizer = Drive(method, lr=0.01).begin().optimizer
    peft = create_loraplus_optimizer(
        method.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0
    )
    assert _rates(optimizer) == _rates(peft)
    assert set(_rates(optimizer).values()) == {0.01, 0.04}


def _rates(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_all_else_of_the_groups_stays():
    method = prepared(LoraPlus(rank=3), tiny.llama())
    trained = [p for p in method.model.parameters() if p.requires_grad]
    groups = [{"params": trained[:6], "weight_decay": 0.1}, {"params": trained[6:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    method.arrange(optimizer)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in trained] == [0.1] * 6 + [0.0] * (len(trained) - 6)


def test_an_optimiser_of_the_users_is_refused():
    method = prepared(LoraPlus(rank=3), tiny.llama())
    drive = Drive(method)
    drive.session.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="has an optimiser already, and lora-plus gives B a"):
        method.join(drive.session)
    with pytest.raises(ValueError, match=r"`ratio` is 0.5; it must be a number of at least 1"):
        LoraPlus(ratio=0.5)
