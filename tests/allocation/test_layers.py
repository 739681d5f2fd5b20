import pytest
import tiny
from peft.tuners.lora.config import KasaConfig, MontecloraConfig

from loralloc.allocation.blocks import block_index, block_list, modules_per_block
from loralloc.allocation.layers import (
    active_adapter,
    lora_config,
    lora_layers,
    rank_cost,
    ranks,
)


@pytest.mark.parametrize(
    ("build", "count"),
    [(tiny.llama, 7), (tiny.gpt2, 4), (tiny.bert_classifier, 6), (tiny.roberta_classifier, 6)],
)
def test_every_linear_layer_of_a_block_counts_once(build, count):
    model = tiny.adapted(build())
    layers = lora_layers(model)
    assert len(layers) == 2 * count
    assert modules_per_block(model, layers) == count


def test_layers_come_in_model_order_under_their_names_in_the_base_model():
    model = tiny.adapted(tiny.llama())
    base = model.get_base_model()
    layers = lora_layers(model)
    assert all(base.get_submodule(name) is layer for name, layer in layers.items())
    order = [name for name, _ in base.named_modules() if name in layers]
    assert list(layers) == order


def test_a_rank_costs_a_row_of_a_and_a_column_of_b():
    layers = lora_layers(tiny.adapted(tiny.gpt2()))
    assert rank_cost(layers["transformer.h.0.attn.c_attn"]) == 32 + 96
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert rank_cost(layer) * layer.r["default"] == a.numel() + b.numel()


def test_blocks_that_differ_count_by_the_largest():
    model = tiny.adapted(tiny.llama(), target_modules=r".*layers\.0\.self_attn\.\w_proj|.*k_proj")
    assert modules_per_block(model, lora_layers(model)) == 4


def test_modules_outside_the_blocks_are_in_no_block():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "lm_head"])
    layers = lora_layers(model)
    name, blocks = block_list(model, layers)
    assert (name, len(blocks)) == ("model.layers", 2)
    assert [block_index(module, name) for module in layers] == [0, 1, None]
    assert modules_per_block(model, layers) == 1


def test_no_blocks_at_all_have_no_count():
    model = tiny.adapted(tiny.llama(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match='give a number or "model"'):
        modules_per_block(model, lora_layers(model))


def test_ranks_follow_a_rank_pattern():
    model = tiny.adapted(tiny.gpt2(), r=4, rank_pattern={"c_fc": 2})
    assert set(ranks(lora_layers(model)).values()) == {2, 4}


def test_an_adapter_of_another_name_is_another_adapter():
    model = tiny.adapted(tiny.llama(), r=4)
    model.add_adapter("second", type(lora_config(model))(r=2, target_modules=["q_proj"]))
    assert len(lora_layers(model, "default")) == 14
    assert len(lora_layers(model, "second")) == 2


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(
        TypeError, match=r"no LoRA adapter named 'default' \(adapters found: none\)"
    ):
        lora_layers(tiny.llama())


def test_an_unknown_adapter_is_refused_with_those_there_are():
    with pytest.raises(TypeError) as error:
        lora_layers(tiny.adapted(tiny.llama()), "mine")
    assert str(error.value) == (
        "The model has no LoRA adapter named 'mine' (adapters found: 'default' (LORA)); pass "
        "`adapter_name='default'`."
    )


def test_the_active_adapter_is_the_one_that_the_layers_use():
    model = tiny.adapted(tiny.llama(), r=4)
    assert active_adapter(model) == "default"
    model.add_adapter("second", type(lora_config(model))(r=2, target_modules=["q_proj"]))
    assert active_adapter(model) == "default"
    model.set_adapter("second")
    assert active_adapter(model) == active_adapter(model.get_base_model()) == "second"
    assert active_adapter(tiny.llama()) == "default"


def test_several_active_adapters_want_one_to_be_named():
    model = tiny.adapted(tiny.llama(), r=4)
    model.add_adapter("second", type(lora_config(model))(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="The adapters 'default', 'second' are active at once"):
        active_adapter(model)


def test_dora_is_refused():
    model = tiny.adapted(tiny.llama(), use_dora=True)
    with pytest.raises(TypeError, match=r"`use_dora`.*plain LoRA"):
        lora_layers(model)


@pytest.mark.parametrize(
    "options",
    [
        # Columns of B are not all of the adapter: a bias, a diagonal, samplers.
        dict(lora_bias=True),
        dict(kasa_config=KasaConfig()),
        dict(monteclora_config=MontecloraConfig()),
        dict(init_lora_weights="mica"),
        # The backbone is changed by as many ranks as there are at first, and again on opening.
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="olora"),
    ],
    ids=["lora_bias", "kasa", "monteclora", "mica", "pissa", "olora"],
)
def test_other_forms_of_lora_are_refused(options):
    # GPT-2's layers have the bias that PEFT asks for beside `lora_bias`.
    model = tiny.adapted(tiny.gpt2() if "lora_bias" in options else tiny.llama(), **options)
    with pytest.raises(TypeError, match=next(iter(options))):
        lora_layers(model)


def test_an_embedding_is_refused():
    model = tiny.adapted(tiny.llama(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(TypeError, match=r"model\.embed_tokens is a Embedding; .*linear layers"):
        lora_layers(model)
