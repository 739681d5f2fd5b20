"""Models of known shapes with random weights, made on the device that they are to run on.

A machine with a GPU and without a network needs no weights for a measure of time or memory.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    },
    "smollm2-135m": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    },
}


def device() -> torch.device:
    """Where benchmarks compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(shape: str, *, dtype: torch.dtype = torch.bfloat16, **ranks: Any) -> Any:
    """A Llama of that shape under LoRA on all linears, in training mode.

    Args:
        shape: One of `SHAPES`.
        dtype: Of the frozen weights; those of LoRA are float32, as PEFT has them.
        ranks: Options of `LoraConfig` beside r = 8, alpha = 16.
    """
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=4096, **SHAPES[shape])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device())
    # What is no parameter was emptied too.
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(std=0.02)
    model.tie_weights()
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **ranks}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def batch(shape: str, examples: int, length: int, *, supervised: float = 1.0) -> dict[str, Tensor]:
    """Random tokens on the device, a share of which are supervised: the last of every example."""
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (examples, length), device=device())
    labels = ids.clone()
    labels[:, : round((1 - supervised) * length)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
