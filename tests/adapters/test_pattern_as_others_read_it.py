"""A pattern of ranks in the words of other trainers."""

import json

import pytest
import tiny
import yaml
from peft import LoraConfig, get_peft_model
from trainers import ranks_now

from loralloc import resize
from loralloc.adapters.pattern import Pattern
from loralloc.allocation.layers import lora_layers

Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
UP1 = "model.layers.1.mlp.up_proj"
RANKS = {Q0: 3, V0: 1, UP1: 1, "model.layers.1.mlp.down_proj": 0}


@pytest.fixture
def pattern():
    return Pattern(ranks=RANKS, scaling=2.0)


def test_peft_makes_the_adapter_that_was_found(pattern):
    config = LoraConfig(**json.loads(pattern.peft_json()), task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    assert ranks_now(model) == {Q0: 3, V0: 1, UP1: 1}
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}
    config = LoraConfig(target_modules=tiny.LLAMA_TARGETS, r=4, lora_alpha=8)
    other = get_peft_model(tiny.llama(), config)
    resize(other, {name: RANKS.get(name, 0) for name in ranks_now(other)})
    shapes = [
        {name: tuple(p.shape) for name, p in each.named_parameters() if p.requires_grad}
        for each in (model, other)
    ]
    assert shapes[0] == shapes[1]


def test_axolotl_is_told_a_rank_for_every_module(pattern):
    said, peft = yaml.safe_load(pattern.axolotl_yaml()), pattern.peft_options()
    assert said.pop("adapter") == "lora"
    assert said == {
        "lora_r": peft["r"],
        "lora_alpha": peft["lora_alpha"],
        "lora_target_modules": peft["target_modules"],
        "lora_rank_pattern": peft["rank_pattern"],
        "lora_alpha_pattern": peft["alpha_pattern"],
    }
    assert said["lora_r"] == 1 and list(said["lora_rank_pattern"].values()) == [3]


def test_where_there_is_one_rank_for_all_it_is_the_mean_with_the_scaling_kept(pattern):
    said = yaml.safe_load(pattern.llama_factory_yaml())
    assert (said["lora_rank"], said["lora_alpha"]) == (2, 4)
    assert said["lora_target"].split(",") == [Q0, V0, UP1]


def test_trls_parser_reads_the_flags(pattern):
    from transformers import HfArgumentParser
    from trl import ModelConfig

    (model,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(
        pattern.trl_flags().split()
    )
    assert model.use_peft and (model.lora_r, model.lora_alpha) == (2, 4)
    assert model.lora_target_modules == [Q0, V0, UP1]


@pytest.mark.parametrize(("ranks", "usual"), [((1, 1, 4), 1), ((2, 2, 1, 1), 1), ((8,), 8)])
def test_the_usual_rank_is_the_most_frequent_then_the_lower(ranks, usual):
    assert Pattern(ranks=dict(enumerate_names(ranks)), scaling=1.0).usual == usual


def enumerate_names(ranks):
    return ((f"m{i}", rank) for i, rank in enumerate(ranks))


def test_an_alpha_that_is_no_whole_number_stays_one():
    pattern = Pattern(ranks={"a": 3, "b": 1}, scaling=0.5)
    assert pattern.peft_options()["lora_alpha"] == 0.5
    assert pattern.peft_options()["alpha_pattern"] == {"^a": 1.5}


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(ValueError, match="has no module with a rank"):
        Pattern(ranks={"a": 0}, scaling=1.0)
