"""Each planted fault is found, by the consumers that have it, and nothing is in sound folders."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loralloc.adapters.folder import CONFIG, Adapter, LoraModule, declared
from loralloc.adapters.forms import portable
from loralloc.adapters.lint import CONSUMERS, lint

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
NAMES = tuple(f"model.layers.{layer}.{kind}" for layer in range(3) for kind in KINDS)
Q1 = NAMES[3]
KEY = "^" + re.escape(Q1)
PLAIN = dict(peft_type="LORA", task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj"])
ONE_SCALING = {"PEFT hotswap", "vLLM 0.31", "vllm-omni", "TensorRT-LLM", "TGI", "LoRAX"}
VLLM = {"vLLM", "vLLM 0.31", "vllm-omni"}


def folder(names=NAMES, ranks=None, others=None, **config) -> Adapter:
    """An adapter of rank 8 but for some modules, with what the configuration makes of it."""
    config, modules = {**PLAIN, **config}, {}
    for name in names:
        rank = (ranks or {}).get(name, config["r"])
        stated, scaling = declared(config, name)
        a, b = torch.ones(rank, 4), torch.ones(6, rank)
        modules[name] = LoraModule(a=a, b=b, scaling=scaling, declared_rank=stated)
    return Adapter(path=Path("x"), config=config, modules=modules, others=others or {})


def shown(adapter: Adapter) -> set[str]:
    return {finding.consumer for finding in lint(adapter)}


EXPERTS = tuple(f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(2) for e in range(2))
UNET = tuple(f"unet.down_blocks.{n}.attentions.to_q" for n in range(2))
HEAD = {"base_model.model.lm_head.weight": torch.ones(2, 2)}
FAULTY = {
    "an alpha of its own": (
        folder(alpha_pattern={KEY: 4}),
        ONE_SCALING | {"SGLang", "llama.cpp"},
        "scales model.layers.1.self_attn.q_proj by 2 in the place of 0.5",
    ),
    "a smaller rank with the same alpha": (
        folder(ranks={Q1: 4}, rank_pattern={KEY: 4}),
        ONE_SCALING | {"SGLang"},
        "by 2 in the place of 4",
    ),
    "a larger rank with the same scaling": (
        folder(ranks={Q1: 12}, rank_pattern={KEY: 12}, alpha_pattern={KEY: 24}),
        {"vllm-omni", "SGLang", "TGI", "LoRAX", "llama.cpp"},
        "has buffers for `r` = 8",
    ),
    "rsLoRA": (folder(use_rslora=True), {"SGLang", "llama.cpp"}, "nor `use_rslora`"),
    "experts of unequal ranks": (
        folder(
            EXPERTS,
            dict.fromkeys(EXPERTS[1::2], 4),
            rank_pattern={"1.up_proj": 4},
            alpha_pattern={"1.up_proj": 8},
        ),
        {*VLLM, "SGLang", "llama.cpp"},
        "whose ranks differ: model.layers.0.mlp.experts.*.up_proj has 4 to 8",
    ),
    "a module that was emptied": (
        folder(tuple(name for name in NAMES if name != Q1)),
        {"TGI", "LoRAX"},
        r"drops model.layers.*.self_attn.q_proj in all layers, since layer 1 has none",
    ),
    "a general key before a special one": (
        folder(ranks={Q1: 4}, rank_pattern={"q_proj": 8, KEY: 4}),
        {"PEFT", "SGLang", "TGI", "LoRAX", "llama.cpp"},
        "has 4 ranks and the configuration says 8",
    ),
    "a key that matches nothing": (
        folder(alpha_pattern={"layers.7.self_attn.q_proj": 16}),
        {"PEFT"},
        "never uses 'layers.7.self_attn.q_proj' of `alpha_pattern`",
    ),
    "a trained head": (
        folder(modules_to_save=["lm_head"], others=HEAD),
        {*VLLM, "llama.cpp", "TGI", "LoRAX"},
        "loads ranks only, and the adapter holds base_model.model.lm_head.weight too",
    ),
    "DoRA": (
        folder(use_dora=True),
        {*VLLM, "llama.cpp", "TGI", "LoRAX"},
        "has no `use_dora`",
    ),
    "a changed backbone": (
        folder(init_lora_weights="pissa"),
        {*VLLM, "llama.cpp", "TGI", "LoRAX"},
        "a backbone that `init_lora_weights='pissa'` has not changed there",
    ),
    "more ranks than a server has": (
        folder(r=520, lora_alpha=520),
        VLLM,
        "has ranks up to 512, and this adapter 520",
    ),
    "ranks of a diffusion model": (
        folder(UNET, {UNET[0]: 4}, rank_pattern={UNET[0]: 4}, alpha_pattern={UNET[0]: 8}),
        {"SGLang", "TGI", "LoRAX", "llama.cpp", "diffusers"},
        "takes alpha to be the rank where ranks differ",
    ),
}
WIDE = folder(ranks={Q1: 12}, rank_pattern={KEY: 12}, use_rslora=True)
SHAPES = dict.fromkeys((*NAMES, "model.layers.2.mlp.down_proj"), (6, 4))


def of_form(adapter: Adapter) -> Adapter:
    form = portable(adapter, SHAPES)
    names = [key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
             for key in form.tensors if "lora_A" in key]  # fmt: skip
    return folder(names, **form.config)


SOUND = {
    "plain": folder(),
    "alpha is r": folder(lora_alpha=8),
    "few kinds": folder(tuple(name for name in NAMES if "q_proj" in name)),
    "one layer": folder(NAMES[:3]),
    "patterns that say nothing new": folder(rank_pattern={KEY: 8}, alpha_pattern={KEY: 16}),
    "rsLoRA of rank 1": folder(r=1, use_rslora=True),
    "outside of layers": folder((*NAMES, "lm_head")),
    "a classifier with its head": folder(task_type="SEQ_CLS", others=HEAD),
    "no task named": folder(task_type=None),
    "portable of unequal ranks": of_form(WIDE),
    "portable of an emptied module": of_form(FAULTY["a module that was emptied"][0]),
    "diffusion of one rank": folder(UNET),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_planted_fault_is_found_by_those_that_have_it(fault):
    adapter, consumers, words = FAULTY[fault]
    assert shown(adapter) == set(consumers)
    assert any(words in finding.reason for finding in lint(adapter))


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_folder(name):
    assert lint(SOUND[name]) == []


def test_a_key_of_an_embedding_matches_it():
    tensors = {f"base_model.model.embed_tokens.lora_embedding_{x}": torch.ones(1) for x in "AB"}
    adapter = folder(rank_pattern={"embed_tokens": 4}, others=tensors)
    assert lint(adapter, only=["PEFT"]) == []


def test_a_changed_backbone_is_refused_or_not_noticed():
    found = lint(FAULTY["a changed backbone"][0], only=["vLLM", "vLLM 0.31"])
    assert [finding.reason.split("`")[0].strip() for finding in found] == [
        "refuses",
        "adds it to a backbone that",
    ]


def test_only_those_asked_for_answer():
    adapter = FAULTY["rsLoRA"][0]
    assert [finding.consumer for finding in lint(adapter, only=["LLaMA.cpp", "vllm"])] == [
        "llama.cpp"
    ]
    with pytest.raises(ValueError, match="There is no consumer 'ollama'; use one of 'PEFT'"):
        lint(adapter, only=["ollama"])


def test_a_rank_that_differs_from_the_configuration_is_no_other_consumers_matter():
    adapter = folder()
    module = replace(adapter.modules[Q1], declared_rank=4)
    changed = replace(adapter, modules={**adapter.modules, Q1: module})
    assert shown(changed) == {"PEFT"}
    assert set(CONSUMERS) > shown(changed)


def test_a_key_that_is_no_expression_is_named():
    with pytest.raises(ValueError, match=rf"'q_\(' in a pattern of {CONFIG} is no regular"):
        folder(rank_pattern={"q_(": 4})


def test_configuration_is_json_that_a_file_can_hold():
    assert json.loads(json.dumps(dict(SOUND["portable of unequal ranks"].config)))["r"] == 12
