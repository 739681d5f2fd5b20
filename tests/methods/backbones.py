"""The paper's backbones in their real shapes, without weights."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CONFIGS = {
    "llama-2-7b": LlamaConfig(),  # its defaults are LLaMA-7B
    "roberta-large": RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
}
CLASSES = {
    "llama-2-7b": LlamaForCausalLM,
    "roberta-large": RobertaForSequenceClassification,
    "gpt2-large": GPT2LMHeadModel,
}


def build(name: str):
    with torch.device("meta"):
        return CLASSES[name](CONFIGS[name])
