"""A LoRA adapter in a GGUF file, as llama.cpp loads it with `--lora`.

The tensors of a weight W are W.lora_a, shape (num_ranks, in_features), and W.lora_b, shape
(out_features, num_ranks), under llama.cpp's names; its loader multiplies each product by
`adapter.lora.alpha` over the tensor's own rank. Nothing but LoRA on weights goes into such a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from loralloc.adapters.folder import Adapter

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gpt2": "gpt2"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
}
"""llama.cpp's architecture by the model type of Transformers."""

ROTATED = ("llama", "mistral")
"""Model types of which llama.cpp's files hold the rows of queries and keys in another order."""

TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
"""GGUF's type of a tensor, and of a file, by torch's."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How llama.cpp names and orders the weights of a backbone."""

    architecture: str
    """llama.cpp's name of it."""

    names: Mapping[str, str]
    """llama.cpp's name of a weight, without ".weight", by that of its module."""

    heads: Mapping[str, int]
    """Modules whose rows are reordered, with their number of heads."""


def layout_of(config: Any, modules: Iterable[str]) -> Layout:
    """How llama.cpp holds the modules of a backbone.

    Args:
        config: Its configuration, as Transformers has it.
        modules: Full names of its linear modules.

    Raises:
        ValueError: The model's type is not among `ARCHITECTURES`.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"The backbone is of type {kind!r}, whose layout in GGUF is not known here; `--to "
            f"gguf` takes {', '.join(ARCHITECTURES)}. `--to merged` gives a model that llama.cpp's "
            "own script converts."
        )
    architecture = ARCHITECTURES[kind]
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    names = {name: known.get_name(name) for name in modules}
    heads = {}
    if kind in ROTATED:
        for name in names:
            if name.endswith(".q_proj"):
                heads[name] = int(config.num_attention_heads)
            elif name.endswith(".k_proj"):
                heads[name] = int(config.num_key_value_heads or config.num_attention_heads)
    found = {name: other for name, other in names.items() if other}
    if getattr(config, "tie_word_embeddings", False):
        found.pop("lm_head", None)  # one tensor there, of which LoRA can change one use only
    return Layout(architecture=architecture, names=found, heads=heads)


def write_gguf(path: Path, adapter: Adapter, layout: Layout, dtype: torch.dtype) -> None:
    """Write an adapter.

    Args:
        path: The file.
        adapter: Plain LoRA with nothing beside it.
        layout: Of its backbone.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: The adapter has what such a file cannot hold.
    """
    adapter.check_plain()
    if adapter.others:
        raise ValueError(
            f"The adapter in {adapter.path} holds {min(adapter.others)} beside its ranks, and a "
            "GGUF adapter holds ranks only; use `--to merged`, and llama.cpp's own script."
        )
    unknown = [name for name in adapter.modules if name not in layout.names]
    if unknown:
        raise ValueError(
            f"llama.cpp has no weight of its own for {unknown[0]} in an adapter for "
            f"{layout.architecture}; use `--to merged`."
        )
    alpha = float(max(module.rank for module in adapter.modules.values()))
    type_name, file_type = TYPES[dtype]
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, module in adapter.modules.items():
        b = module.b.float()
        if name in layout.heads:
            b = to_rotated(b, layout.heads[name])
        # The loader multiplies by alpha / rank, so that B takes in what is left of the scaling.
        b = b * (module.scaling * module.rank / alpha)
        for end, tensor in (("lora_a", module.a.float()), ("lora_b", b)):
            data = gguf.quantize(tensor.contiguous().numpy(), kind)
            writer.add_tensor(f"{layout.names[name]}.weight.{end}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, layout: Layout) -> dict[str, Tensor]:
    """What a file adds to the weights, shape (out_features, in_features), by module.

    Raises:
        ValueError: It names a weight that the backbone has not.
    """
    reader = gguf.GGUFReader(path)
    (alpha,) = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].parts[-1].tolist()
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    modules = {other: name for name, other in layout.names.items()}
    deltas = {}
    for key, a in tensors.items():
        weight, _, end = key.rpartition(".weight.")
        if end != "lora_a":
            continue
        if weight not in modules:
            raise ValueError(f"{path} names {weight}, which this backbone has not.")
        b = tensors[f"{weight}.weight.lora_b"]
        name = modules[weight]
        delta = alpha / b.shape[1] * (b @ a)
        deltas[name] = from_rotated(delta, layout.heads[name]) if name in layout.heads else delta
    return deltas


def to_rotated(rows: Tensor, num_heads: int) -> Tensor:
    """Rows in llama.cpp's order: the halves of each head interleaved, for its rotary embedding."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def from_rotated(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `to_rotated`."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)
