"""Logits of exported adapters as stock PEFT has them, or as a loader's own arithmetic gives them.

Run as a script, by a process that cannot import loralloc: it reads a list of jobs and writes the
logits of each. What llama.cpp, MLX-LM and vLLM compute is written here from their sources, and from
nothing of ours.
"""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CLASSES = {"lm": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification"}


def add(model, name, delta):
    """Change a weight, which Conv1D holds transposed."""
    module = model.get_submodule(name)
    with torch.no_grad():
        module.weight += delta.T if type(module).__name__ == "Conv1D" else delta


def as_llama_cpp(model, folder):
    """scale = alpha / rank of the tensor; rows of q and k unrolled from the halves of each head."""
    import gguf

    reader = gguf.GGUFReader(folder / "adapter.gguf")
    text = {key: field.contents() for key, field in reader.fields.items()}
    assert (text["general.type"], text["adapter.type"]) == ("adapter", "lora")
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    words = {
        "attn_qkv": "attn.c_attn",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_gate": "mlp.gate_proj",
    }
    two = {"llama": ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "model.layers")}
    two["gpt2"] = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj", "transformer.h")
    *found, layers = two[text["general.architecture"]]
    words |= dict(zip(("attn_output", "ffn_up", "ffn_down"), found, strict=True))
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        b = tensors[key[:-1] + "b"]
        assert a.shape[0] == b.shape[1]
        delta = text["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        _, layer, word, _, _ = key.split(".")
        if layers == "model.layers" and word in ("attn_q", "attn_k"):
            config = model.config
            heads = config.num_attention_heads if word == "attn_q" else config.num_key_value_heads
            size = len(delta) // heads
            rows = [h * size + 2 * (i % (size // 2)) + i // (size // 2)
                    for h in range(heads) for i in range(size)]  # fmt: skip
            delta = delta[rows]
        add(model, f"{layers}.{layer}.{words[word]}", delta)
    return model


def as_mlx(model, folder):
    """One rank and one scale; y + scale * (x A) B in the last `num_layers` layers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    options, seen = config["lora_parameters"], set()
    for key, a in load_file(folder / "adapters.safetensors").items():
        name, which = key.rsplit(".", 1)
        if which == "lora_b":
            continue
        b = load_file(folder / "adapters.safetensors")[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == options["rank"]
        layer, rest = re.fullmatch(r"model\.(?:layers|h)\.(\d+)\.(.+)", name).groups()
        assert rest in options["keys"] and int(layer) < config["num_layers"]
        seen.add(rest)
        gpt2 = name.startswith("model.h.")
        add(model, f"transformer.{name[6:]}" if gpt2 else name, options["scale"] * (a @ b).T)
    assert seen == set(options["keys"])
    return model


def as_vllm(model, folder):
    """PEFTHelper to 0.31: one scaling for all modules, from r and lora_alpha, and no patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert len(a) <= r, "a buffer of r ranks"
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            add(model, name, scaling * (b @ a))
    return model


def main(jobs_file: str, answers_file: str) -> None:
    sys.path[:] = [path for path in sys.path if not (Path(path) / "loralloc").exists()]
    assert importlib.util.find_spec("loralloc") is None
    import transformers

    answers = {}
    for index, job in enumerate(json.loads(Path(jobs_file).read_text())):
        loader = getattr(transformers, CLASSES[job["head"]])
        folder, how = Path(job["folder"]), job["how"]
        options = {"dtype": torch.float32}
        if how == "merged":
            model = loader.from_pretrained(folder, **options)
        else:
            if job["head"] == "classifier":
                options["num_labels"] = 3
            model = loader.from_pretrained(job["base"], **options)
            if how in ("peft", "portable"):
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, folder)
            else:
                model = {"gguf": as_llama_cpp, "mlx": as_mlx, "vllm": as_vllm}[how](model, folder)
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            answers[str(index)] = model.eval()(input_ids=ids).logits.contiguous()
    assert "loralloc" not in sys.modules
    save_file(answers, answers_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
