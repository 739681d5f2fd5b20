import pytest
import tiny
from peft import LoraConfig, get_peft_model

from loralloc.allocation.blocks import block_linears
from loralloc.allocation.layers import lora_layers
from loralloc.methods.catalog import get_method
from loralloc.methods.expert_parameters import adapted_parameters
from loralloc.methods.peft_method import resolve_targets


def adapted_names(model, targets):
    config = LoraConfig(target_modules=targets, fan_in_fan_out="GPT2" in type(model).__name__)
    return list(lora_layers(get_peft_model(model, config)))


@pytest.mark.parametrize(
    ("build", "per_block"),
    [(tiny.llama, 7), (tiny.gpt2, 4), (tiny.bert_classifier, 6), (tiny.roberta_classifier, 6)],
)
def test_by_default_every_linear_layer_of_every_block_and_no_other(build, per_block):
    model = build()
    names = adapted_names(model, resolve_targets(model, None))
    assert len(names) == 2 * per_block
    assert not [name for name in names if "pooler" in name or "classifier" in name]


def test_names_from_the_block_on_match_in_every_block():
    assert "self_attn.q_proj" in block_linears(tiny.llama())
    assert "attention.output.dense" in block_linears(tiny.bert_classifier())


@pytest.mark.parametrize(
    "wanted",
    [["q_proj", "v_proj"], ["self_attn.q_proj", "mlp.up_proj"], "all-linear", ["all-linear"]],
)
def test_names_that_match_are_passed_on(wanted):
    targets = resolve_targets(tiny.llama(), wanted)
    assert targets == ("all-linear" if "all-linear" in wanted else wanted)


def test_a_regular_expression_is_passed_on():
    model = tiny.llama()
    names = adapted_names(model, resolve_targets(model, r".*\.1\..*q_proj"))
    assert names == ["model.layers.1.self_attn.q_proj"]


def test_one_name_alone_is_a_name():
    """TRL's `ModelConfig` makes a text of a list of one."""
    model = tiny.llama()
    assert len(adapted_names(model, resolve_targets(model, "q_proj"))) == 2


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["q_proj", "v_porj"], "names 'v_porj', which matches no module; did you mean .*'v_proj'"),
        (["query"], "names 'query', which matches no module"),
        (["zzz"], "linear layers end in down_proj, gate_proj, k_proj"),
        (["proj"], "names 'proj', which matches no module"),
        ("q_porj", "names 'q_porj', which matches no module; did you mean .*'q_proj'"),
    ],
)
def test_names_that_match_nothing_are_refused_with_the_nearest(wanted, words):
    with pytest.raises(ValueError, match=words):
        resolve_targets(tiny.llama(), wanted)


def test_a_model_without_blocks_is_refused():
    from torch import nn

    with pytest.raises(ValueError, match="has no list of transformer blocks with linear layers"):
        resolve_targets(nn.Sequential(nn.Linear(2, 2)), None)


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}], ids=["experts", "one dense"])
def test_by_default_a_mixture_of_experts_is_adapted_at_linear_layers_only(changes):
    model = tiny.mixture(**changes)
    targets = resolve_targets(model, None)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets))
    assert targets == ATTENTION
    assert not adapted.peft_config["default"].target_parameters
    assert len(lora_layers(adapted)) == 8


@pytest.mark.parametrize("wanted", ["all-linear", ["all-linear"]])
def test_all_linear_of_a_mixture_of_experts_is_refused_with_names_that_work(wanted):
    with pytest.raises(ValueError) as refused:
        resolve_targets(tiny.mixture(), wanted)
    sentence = str(refused.value)
    assert f"`lora_target_modules` is {wanted!r}, by which PEFT would adapt the experts" in sentence
    assert "(down_proj, gate.weight, gate_up_proj), which are parameters" in sentence
    assert "name parameters in `lora_target_parameters`" in sentence
    names = sentence.rpartition("use ")[2].rstrip(".").split(", ")
    assert resolve_targets(tiny.mixture(), names) == names


@pytest.mark.parametrize(
    "wanted", [["mlp.gate_proj", "mlp.up_proj"], ["q_proj", "mlp.gate_proj"], r".*mlp\.down_proj"]
)
def test_names_that_peft_takes_for_experts_are_refused_by_what_was_named(wanted):
    with pytest.raises(ValueError, match="by which PEFT would adapt the experts") as refused:
        resolve_targets(tiny.mixture(mlp_only_layers=[0]), wanted)
    assert f"`lora_target_modules` is {wanted!r}" in str(refused.value)
    assert "use self_attn.q_proj" in str(refused.value)


def test_linear_layers_of_a_mixture_of_experts_can_be_named():
    model = tiny.mixture(mlp_only_layers=[0])
    assert resolve_targets(model, ["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert len(adapted_names(model, resolve_targets(model, ["q_proj", "v_proj"]))) == 4


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("method", ["lora", "alora"])
def test_experts_are_adapted_beside_linear_layers_where_they_are_named(method):
    chosen = get_method(method)(rank=2, parameters=EXPERTS)
    model = tiny.mixture()
    expected = chosen.count(model, 2)
    assert adapted_parameters(model, EXPERTS) == {
        f"model.layers.{i}.{name}": cost
        for i in (0, 1)
        for name, cost in zip(EXPERTS, (4 * (32 + 32), 4 * (16 + 32)), strict=True)
    }
    chosen.prepare(model, task_type="CAUSAL_LM")
    assert chosen.num_trained() == expected
    assert len(lora_layers(chosen.model)) == 8 + 4


@pytest.mark.parametrize(
    ("build", "wanted", "words"),
    [
        (tiny.mixture, ["experts.dwn_proj"], "did you mean 'mlp.experts.down_proj'"),
        (tiny.mixture, "zz", "there are mlp.experts.gate_up_proj, mlp.experts.down_proj"),
        (tiny.mixture, ["self_attn.q_proj.weight"], "matches no such parameter"),
        (tiny.llama, EXPERTS, "LlamaForCausalLM has no experts that are one parameter"),
    ],
)
def test_parameters_that_are_not_there_are_refused(build, wanted, words):
    with pytest.raises(ValueError, match=words):
        adapted_parameters(build(), wanted)


@pytest.mark.parametrize("options", [dict(dropout=0.1), dict(use_dora=True)])
def test_what_peft_does_not_have_for_parameters_is_refused(options):
    method = get_method("lora")(rank=2, parameters=EXPERTS, **options)
    with pytest.raises(ValueError, match="which PEFT does not have for parameters"):
        method.prepare(tiny.mixture(), task_type="CAUSAL_LM")
