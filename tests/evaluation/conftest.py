"""Tiny language models to generate and to score with."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture(params=("llama", "gpt2"))
def model(request, llama_folder, tokenizer):
    """In float32, with an adapter that has learnt something."""
    if request.param == "llama":
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    else:
        base = tiny.gpt2(vocab_size=len(tokenizer), n_positions=512)
    return tiny.with_trained_b(tiny.adapted(base))
