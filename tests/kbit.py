"""Tiny models that bitsandbytes has quantised: in 4 bits, with constants in 8, and in 8 bits."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

KINDS = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8bit": dict(load_in_8bit=True),
}


def save_wide(folder: Path) -> Path:
    """Blocks of 64 numbers share a scale: narrower layers are not quantised as real ones are."""
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def llama(folder: Path, kind: str, dtype: torch.dtype = torch.float32):
    """The model of a folder, computing in a type, without an adapter."""
    pytest.importorskip("bitsandbytes")
    options = dict(KINDS[kind])
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        dtype=dtype,
        device_map={"": "cpu"},
    )
