"""LoRA parameters of the paper's backbones, counted without weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from loralloc.allocation.blocks import modules_per_block
from loralloc.allocation.layers import lora_layers, rank_cost
from loralloc.methods.peft_method import resolve_targets


def llama_2_7b():
    return LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B


def smollm2_135m():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def roberta_large():
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        )
    )


def gpt2_large():
    return GPT2LMHeadModel(GPT2Config(n_embd=1280, n_layer=36, n_head=20))


@pytest.mark.parametrize(
    ("build", "rank", "num_modules", "per_block", "num_parameters"),
    [
        (llama_2_7b, 8, 224, 7, 19_988_480),
        (llama_2_7b, 16, 224, 7, 39_976_960),
        (roberta_large, 8, 144, 6, 3_538_944),
        (gpt2_large, 8, 144, 4, 5_898_240),
        (smollm2_135m, 8, 210, 7, 2_442_240),
    ],
)
def test_default_targets_give_the_papers_counts(
    build, rank, num_modules, per_block, num_parameters
):
    with torch.device("meta"):
        model = build()
        targets = resolve_targets(model, None)
        options = dict(fan_in_fan_out=True) if build is gpt2_large else {}
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, **options))
    layers = lora_layers(model)
    assert len(layers) == num_modules
    assert modules_per_block(model, layers) == per_block
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == num_parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == num_parameters
    assert rank * sum(map(rank_cost, layers.values())) == num_parameters
