"""An adapter on experts that are one parameter is told from one on linear layers."""

import mixtures
import pytest
import tiny

from loralloc.adapters.folder import read_adapter
from loralloc.adapters.forms import compact, portable
from loralloc.adapters.lint import lint
from loralloc.allocation.layers import lora_layers
from loralloc.allocation.resize import resize

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LAST = f"model.layers.1.{DOWN}"


@pytest.fixture
def folder(tmp_path):
    model = tiny.with_trained_b(
        tiny.adapted(
            mixtures.mixtral(),
            r=2,
            target_modules=["q_proj"],
            target_parameters=[GATE_UP, DOWN],
            task_type="CAUSAL_LM",
        )
    )
    resize(model, {LAST: 3, f"model.layers.0.{GATE_UP}": 0})
    model.save_pretrained(tmp_path)
    return tmp_path


def test_its_ranks_are_those_of_linear_layers_and_parameters_are_named(folder):
    adapter = read_adapter(folder)
    assert adapter.ranks == {f"model.layers.{i}.self_attn.q_proj": 2 for i in (0, 1)}
    on = {name for name in adapter.parameters if name != f"model.layers.0.{GATE_UP}"}
    assert on == {f"model.layers.0.{DOWN}", f"model.layers.1.{GATE_UP}", LAST}
    assert len(adapter.others) == 6


@pytest.mark.parametrize("form", [compact, lambda adapter: portable(adapter, {})])
def test_forms_of_linear_layers_are_refused_by_name(folder, form):
    with pytest.raises(ValueError, match=r"`target_parameters`, so it is more .*`--to merged`"):
        form(read_adapter(folder))


def test_nothing_is_wrong_with_it_for_peft_and_something_for_servers(folder):
    adapter = read_adapter(folder)
    assert not lint(adapter, only=["PEFT"])
    found = {finding.consumer: finding.reason for finding in lint(adapter)}
    assert "gate_up_proj and down_proj together" in found["vLLM"]
    assert found["llama.cpp"] == "has no `target_parameters`"


def test_a_key_that_no_parameter_has_is_told(folder):
    adapter = read_adapter(folder)
    adapter.config["rank_pattern"]["^no\\.such"] = 3
    (finding,) = lint(adapter, only=["PEFT"])
    assert finding.reason.startswith("never uses '^no\\\\.such' of `rank_pattern`")


def test_an_adapter_on_experts_alone_is_read(tmp_path):
    model = tiny.adapted(
        mixtures.mixtral(), target_modules=[], target_parameters=[DOWN], task_type="CAUSAL_LM"
    )
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert not adapter.modules
    assert list(adapter.parameters) == list(lora_layers(model))
    assert not lint(adapter, only=["PEFT"])
